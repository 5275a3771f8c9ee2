"""Files of this process's cgroups."""

from pathlib import Path


def control_files(controller: str, version_1: str, version_2: str, root: Path = Path("/")) -> list[Path]:
    """Return paths of a controller's file, named by version: in the group, its parents and the mounted root, a
    container's own group.

    None need exist.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folder, name, group = root / "sys/fs/cgroup", version_2, ""
    for number, controllers, path in (line.split(":", 2) for line in lines):
        if controller in controllers.split(","):
            folder, name, group = root / "sys/fs/cgroup" / controller, version_1, path
            break
        if number == "0":
            group = path
    relative = Path(group.lstrip("/"))
    return [folder / parent / name for parent in (relative, *relative.parents)]
