"""Which deaths of engines count against their jobs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from server.processes.engine_death import OomKills, death_is_evidence


@pytest.mark.parametrize("may_be_oom", [True, False])
@pytest.mark.parametrize(
    ("code", "blames"),
    [
        *((code, False) for code in (0, 2, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)),
        *((code, True) for code in (1, 3, -signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)),
    ],
)
def test_exit_codes(code: int, may_be_oom: bool, blames: bool) -> None:
    assert death_is_evidence(code, may_be_oom=may_be_oom) == blames


def test_sigkill_is_evidence_only_if_it_may_be_the_kernel_s() -> None:
    assert death_is_evidence(-signal.SIGKILL, may_be_oom=True)
    assert not death_is_evidence(-signal.SIGKILL, may_be_oom=False)
    assert not death_is_evidence(-signal.SIGKILL, may_be_oom=True, killed_by_us=True)


VERSION_2 = ("0::/pod/engine", "sys/fs/cgroup/pod/engine/memory.events")
VERSION_1 = ("4:cpu,memory:/pod/engine\n0::/", "sys/fs/cgroup/memory/pod/engine/memory.oom_control")
CONTAINER = ("0::/somewhere/else", "sys/fs/cgroup/memory.events")


class TestCounters:
    @pytest.mark.parametrize(("groups", "name"), [VERSION_2, VERSION_1, CONTAINER])
    def test_a_counter_of_the_cgroup(self, tmp_path: Path, groups: str, name: str) -> None:
        write(tmp_path / "proc/self/cgroup", groups)
        write(tmp_path / name, "low 0\noom 7\noom_kill 3\n")
        kills = OomKills(tmp_path)
        assert not kills.may_have_risen()
        write(tmp_path / name, "low 0\noom 9\noom_kill 4\n")
        assert kills.may_have_risen()

    def test_a_kill_elsewhere_on_the_machine_does_not_count(self, tmp_path: Path) -> None:
        write(tmp_path / "proc/self/cgroup", VERSION_2[0])
        write(tmp_path / VERSION_2[1], "oom_kill 0")
        write(tmp_path / "proc/vmstat", "oom_kill 5")
        kills = OomKills(tmp_path)
        write(tmp_path / "proc/vmstat", "oom_kill 6")
        assert not kills.may_have_risen()

    def test_a_kill_long_before_a_death_does_not_count(self, tmp_path: Path) -> None:
        write(tmp_path / "proc/vmstat", "oom_kill 0")
        kills = OomKills(tmp_path)
        for total in (1, 2, 3):
            write(tmp_path / "proc/vmstat", f"oom_kill {total}")
            kills.refresh()
            assert kills.may_have_risen(), "the process may not have ended yet"
            kills.refresh()
            assert not kills.may_have_risen()

    @pytest.mark.parametrize("content", ["", "oom 1", "oom_kill many", "oom_kill"])
    def test_without_a_counter_nothing_is_ruled_out(self, tmp_path: Path, content: str) -> None:
        write(tmp_path / "proc/vmstat", content)
        assert OomKills(tmp_path).may_have_risen()

    def test_this_machine_has_one(self) -> None:
        if sys.platform == "linux":
            assert not OomKills().may_have_risen()

    def test_a_real_kill_for_want_of_memory_is_noticed(self) -> None:
        """Where this user may make a memory cgroup; the counters of fake files cover the others."""
        group = Path("/sys/fs/cgroup/memory", f"glimmer-test-{os.getpid()}")
        try:
            group.mkdir()
            (group / "memory.limit_in_bytes").write_text(str(32 * 2**20))
        except OSError:
            return
        try:
            program = f"""
import os, pathlib
pathlib.Path({str(group / "cgroup.procs")!r}).write_text(str(os.getpid()))
from server.processes.engine_death import OomKills
kills = OomKills()
if os.fork() == 0:
    bytearray(2**28)
code = os.waitstatus_to_exitcode(os.wait()[1])
print(code, kills.may_have_risen())
"""
            printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        finally:
            group.rmdir()
        assert printed == f"{-signal.SIGKILL} True\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
