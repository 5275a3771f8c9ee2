"""Child processes that do not outlive their parent, however it ends."""

import os
import signal
import sys
from collections.abc import Sequence

# Only the kernel sees every death, so on Linux the child asks it for a signal (1 is PR_SET_PDEATHSIG); the request
# survives exec. It is made in a small Python that becomes the program, not in a `preexec_fn`, which is unsafe in a
# parent with threads.
_LAUNCHER = """
import ctypes, os, sys
parent, number, argv = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, number, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent died first")
os.execv(argv[0], argv)
"""


def die_with_parent(command: Sequence[str], number: signal.Signals) -> list[str]:
    """The command line that runs `command` as a child which the kernel sends signal `number` when we are gone.

    "We" is the thread that starts the child: the kernel sends the signal when that thread ends, so start it in the main
    one. On systems other than Linux a killed parent leaves its children behind.

    Args:
        command: the program by its full path, and its arguments.
    """
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(int(number)), *command]
