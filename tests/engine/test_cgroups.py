"""Where files of this process's memory cgroup are, by both versions of the kernel's interface."""

from pathlib import Path

import pytest

from engine.cgroups import control_files

V1 = "sys/fs/cgroup/memory/{}old"
V2 = "sys/fs/cgroup/{}new"


@pytest.mark.parametrize(
    ("membership", "paths"),
    [
        ("0::/", [V2.format("")]),
        ("0::/a/b", [V2.format("a/b/"), V2.format("a/"), V2.format("")]),
        ("0::/a:b", [V2.format("a:b/"), V2.format("")]),
        ("4:cpu,memory:/a", [V1.format("a/"), V1.format("")]),
        ("4:memory:/a\n0::/b", [V1.format("a/"), V1.format("")]),
        ("0::/b\n4:memory:/a", [V1.format("a/"), V1.format("")]),
        ("7:devices:/x\n0::/b", [V2.format("b/"), V2.format("")]),
        ("7:memoryless:/x\n0::/b", [V2.format("b/"), V2.format("")]),
    ],
)
def test_paths(tmp_path: Path, membership: str, paths: list[str]) -> None:
    groups = tmp_path / "proc/self/cgroup"
    groups.parent.mkdir(parents=True)
    groups.write_text(membership + "\n")
    assert control_files("memory", "old", "new", tmp_path) == [tmp_path / path for path in paths]


def test_a_machine_without_cgroups(tmp_path: Path) -> None:
    assert control_files("memory", "old", "new", tmp_path) == []
