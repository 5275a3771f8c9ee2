"""A `glimmer api` process on a free port, as the admission benchmark and the chaos campaign start it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from engine.child import die_with_parent


class ApiProcess:
    """A `glimmer api` with the command-line `options` (without dashes); of the environment's settings only `variables`.

    Start it in the main thread: it is killed when the thread that started it ends.
    """

    def __init__(self, options: Mapping[str, object], log: Path, variables: Mapping[str, str] = {}):
        self._log = log
        words = [
            str(word) for name, value in ({"drain-delay-s": 0} | dict(options)).items() for word in (f"--{name}", value)
        ]
        command = [sys.executable, "-m", "server.cli", "api", "--port", "0", *words]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GLIMMER_")}
        environment |= variables
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                die_with_parent(command, signal.SIGKILL),
                stdout=out,
                stderr=out,
                env=environment,
                start_new_session=True,
            )
        self.url = ""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Return None while it runs."""
        return self._process.poll()

    @property
    def alive(self) -> bool:
        return self.exit_code is None

    def listens(self) -> bool:
        """Return whether it listens, and if so set `url`.

        Raises:
            RuntimeError: it ended before; the message is its log.
        """
        found = re.search(r"listens on (http://\S+)", self._log.read_text())
        if found is None and not self.alive:
            raise RuntimeError(f"glimmer api did not start: {self._log.read_text()}")
        self.url = found[1] if found else ""
        return bool(found)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        """Kill it and wait for its end."""
        self._process.kill()
        self._process.wait()
