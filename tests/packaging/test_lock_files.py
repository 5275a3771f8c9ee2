"""The lock files of the container images agree with pyproject.toml."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.packaging.files import ROOT

IMAGES = {"api": ["api"], "engine": ["engine", "torch"]}
EXTRAS = {"api": ["otel"], "engine": ["otel", "engine"]}
# Other releases of torch are tested, too; the two of the reference have an upper bound; Python 3.11 has an older numpy.
BELOW_THE_LOCK = {"torch", "transformers", "diffusers", "numpy"}


def pins(name: str) -> dict[str, list[tuple[Version, int]]]:
    """Return version and number of hashes of each pin; a package may have one per Python version."""
    text = (ROOT / "deploy" / "requirements" / f"{name}.txt").read_text()
    found: dict[str, list[tuple[Version, int]]] = {}
    for block in re.split(r"\n(?=[a-z])", text)[1:]:
        package, version = re.match(r"([\w.-]+)==(\S+)", block).groups()  # pyright: ignore[reportOptionalMemberAccess]
        found.setdefault(package, []).append((Version(version), block.count("--hash=sha256:")))
    return found


def requirements(image: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"]]
    for extra in EXTRAS[image]:
        texts += project["optional-dependencies"][extra]
    return [Requirement(text) for text in texts]


def locked(image: str) -> dict[str, list[tuple[Version, int]]]:
    return {package: versions for name in IMAGES[image] for package, versions in pins(name).items()}


@pytest.mark.parametrize("image", IMAGES)
def test_every_dependency_is_locked_at_a_version_that_the_project_accepts(image: str) -> None:
    for requirement in requirements(image):
        versions = [version for version, _ in locked(image)[requirement.name]]
        assert all(version in requirement.specifier for version in versions), f"{requirement}: run make lock"


@pytest.mark.parametrize("name", ["api", "engine", "torch", "build"])
def test_every_pin_has_hashes(name: str) -> None:
    assert pins(name)
    assert all(hashes for versions in pins(name).values() for _, hashes in versions)


def test_the_api_image_has_no_torch() -> None:
    assert not locked("api").keys() & {"torch", "transformers", "diffusers", "numpy"}


@pytest.mark.parametrize("image", IMAGES)
def test_lower_bounds_are_the_locked_releases(image: str) -> None:
    """A release that is not tested may have known holes: nobody should get one."""
    for requirement in requirements(image):
        if requirement.name in BELOW_THE_LOCK:
            continue
        [bound] = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
        newest = min(version for version, _ in locked(image)[requirement.name])
        assert bound.release[:2] == newest.release[:2], f"{requirement}: the lock has {newest}"
