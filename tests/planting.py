"""Plant bugs in copies of the code, one at a time, and run the test that must find each."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_FOUND = "not found"
TIMEOUT_S = 900  # of a bug's tests, which may hang on it

_IGNORED = shutil.ignore_patterns("node_modules", "__pycache__", "*.safetensors")
_SOME_FAILED = 1  # of pytest's exit codes; others say that no test ran


@dataclass(frozen=True)
class Bug:
    """Replaces `old`, which is once in a file, by `new`.

    Args:
        found_by: the test that must find it: a file, or a file and a name in it.
    """

    name: str
    file: str
    old: str
    new: str
    found_by: str


def try_all(bugs: Sequence[Bug], words: Sequence[str], try_bug: Callable[[Bug], str]) -> int:
    """Try the bugs with all words in their names; print what finds them, and return how many nothing finds."""
    missed = 0
    for bug in bugs:
        if all(word in bug.name for word in words):
            found = try_bug(bug)
            missed += found.startswith(NOT_FOUND)
            print(f"{bug.name}: {found}", flush=True)
    return missed


def try_bug(bug: Bug) -> str:
    """Return how the bug's test fails on it."""
    with copied(bug) as folder:
        ran = run_tests(folder, bug.found_by)
    failed = re.search(r"^FAILED (.*)$", ran.stdout, re.MULTILINE)
    return (
        f"found by {failed[1]}"
        if failed and ran.returncode == _SOME_FAILED
        else f"{NOT_FOUND}: {(ran.stdout + ran.stderr)[-500:]}"
    )


@contextmanager
def copied(*bugs: Bug) -> Iterator[Path]:
    """Yield a folder with a copy of the code, and bugs in it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("engine", "server", "models", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=_IGNORED)
        shutil.copy(ROOT / "pyproject.toml", folder)
        for bug in bugs:
            check(bug)
            file = folder / bug.file
            file.write_text(file.read_text().replace(bug.old, bug.new))
        yield folder


def run_python(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run Python with the code in a folder; its exit status is -SIGKILL after `TIMEOUT_S`."""
    command = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    try:
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, -signal.SIGKILL, "", f"it ran for more than {TIMEOUT_S} seconds")


def run_tests(folder: Path, *tests: str) -> "subprocess.CompletedProcess[str]":
    """Run tests until one fails."""
    return run_python(folder, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests)


def check(bug: Bug) -> None:
    """Raise AssertionError if the bug cannot be planted, or its test is gone."""
    count = (ROOT / bug.file).read_text().count(bug.old)
    assert count == 1, f"{bug.name}: {bug.old!r} is {count} times in {bug.file}"
    file, *names = bug.found_by.split("::")
    tests = (ROOT / file).read_text()
    for name in names:
        assert re.search(rf"^ *(class|def|async def) {name}\b", tests, re.MULTILINE), f"{bug.name}: {bug.found_by}"
