"""Child processes that end with their parent."""

import os
import signal
import sys
from collections.abc import Sequence

# Sets PR_SET_PDEATHSIG (1); `preexec_fn` would be unsafe in a parent with threads.
_LAUNCHER = """
import ctypes, os, sys
parent, sig, argv = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, sig, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent died first")
os.execv(argv[0], argv)
"""


def die_with_parent(command: Sequence[str], sig: signal.Signals) -> list[str]:
    """Return a command line that gets `sig` when the parent ends (on Linux).

    Start it from the main thread: the signal comes when the starting thread ends.

    Args:
        command: full path of the program, and its arguments.
    """
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(int(sig)), *command]
