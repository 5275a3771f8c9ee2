"""Cores that engines share, and how their threads wait."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import cores
from engine.config import ENGINES_VARIABLE
from engine.cores import set_thread_defaults, threads_of_engine, usable_cores

ALL = len(os.sched_getaffinity(0))


def container(root: Path, membership: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(membership + "\n")
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def quota_v1(quota: int) -> dict[str, str]:
    return {"cpu/a/cpu.cfs_quota_us": f"{quota}\n", "cpu/a/cpu.cfs_period_us": "100000\n"}


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a", {}, 8),
        ("0::/a", {"a/cpu.max": "max 100000\n"}, 8),
        ("0::/a", {"a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a", {"a/cpu.max": "250000 100000\n"}, 3),
        ("0::/a", {"a/cpu.max": "5000 100000\n"}, 1),
        ("0::/a", {"a/cpu.max": "1600000 100000\n"}, 8),
        ("0::/a", {"a/cpu.max": "max 100000\n", "cpu.max": "200000 100000\n"}, 2),
        ("0::/a", {"a/cpu.max": "\n"}, 8),
        ("0::/a", {"a/cpu.max": "200000 0\n"}, 8),
        ("4:cpu,cpuacct:/a", quota_v1(-1), 8),
        ("4:cpu,cpuacct:/a", quota_v1(400000), 4),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "400000\n"}, 8),
    ],
)
def test_a_container_s_quota_bounds_the_cores(
    tmp_path: Path, membership: str, files: dict[str, str], expected: int
) -> None:
    assert usable_cores(container(tmp_path, membership, files)) == expected


@given(engines=st.integers(1, 300), available=st.integers(1, 256))
def test_threads_of_all_engines_fit_the_cores(engines: int, available: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cores, "usable_cores", lambda: available)
        each = threads_of_engine(engines)
    assert each >= 1
    assert each == 1 or each * engines <= available < (each + 1) * engines


def test_what_is_set_by_hand_stays() -> None:
    environment = {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "active"}
    set_thread_defaults(environment)
    assert environment == {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "active"}


@pytest.mark.parametrize(("engines", "expected"), [("", 8), ("3", 2), ("9", 1), ("many", 8)])
@pytest.mark.usefixtures("eight_cores")
def test_an_engine_takes_its_share(monkeypatch: pytest.MonkeyPatch, engines: str, expected: int) -> None:
    monkeypatch.setattr(cores, "control_files", lambda *_: [])
    environment = {ENGINES_VARIABLE: engines}
    set_thread_defaults(environment)
    assert environment["OMP_NUM_THREADS"] == str(expected)


def test_openmp_reads_the_defaults() -> None:
    """Ask OpenMP what it read, after the imports of an engine process."""
    program = (
        "import os; from server.cli import commands; commands.set_thread_defaults(os.environ); import torch; "
        "print(torch.get_num_threads())"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_"))}
    environment = clean | {"OMP_DISPLAY_ENV": "verbose", ENGINES_VARIABLE: str(ALL)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
