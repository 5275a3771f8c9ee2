"""The Dockerfile: a linter, and properties of its two images."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.packaging.files import ROOT, dockerfile, image_environment, image_steps, last, variables_of

TARGETS = ("api", "engine")
BIN = Path(sys.executable).parent


def installs(target: str) -> list[list[str]]:
    """Return the arguments of every `pip install` of the stage whose environment the target copies."""
    copied = next(rest for name, rest in dockerfile()[target].steps if name == "COPY" and "/opt/venv" in rest)
    source = re.match(r"--from=(\S+)", copied)
    assert source, copied
    steps = " && ".join(rest for name, rest in image_steps(source[1]) if name == "RUN")
    commands = re.split(r"&&|;|\bthen\b|\belse\b", steps)
    words = [shlex.split(command) for command in commands if re.search(r"\bpip\b.* install ", command)]
    return [command[command.index("install") + 1 :] for command in words]


def test_hadolint_finds_nothing() -> None:
    found = subprocess.run([BIN / "hadolint", "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_linter_detects_a_bad_file(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python:latest\nRUN pip install torch\nENTRYPOINT glimmer\n")
    assert subprocess.run([BIN / "hadolint", bad], capture_output=True).returncode != 0


@pytest.mark.parametrize(
    ("target", "files"), [("api", ["build", "api"]), ("engine", ["build", "torch", "engine"])], ids=TARGETS
)
def test_images_are_built_from_the_lock_files(target: str, files: list[str]) -> None:
    """Only torch of another index is installed without a hash, at the locked version, and Glimmer from its wheel."""
    commands = installs(target)
    locked = [command for command in commands if "--require-hashes" in command]
    assert [command[-1] for command in locked] == [f"/requirements/{name}.txt" for name in files]
    others = [command for command in commands if command not in locked]
    from_index = [command for command in others if "--index-url" in command]
    assert [command[-1] for command in others if command not in from_index] == ["/wheels/*.whl"]
    assert len(from_index) == (target == "engine")
    assert all("/requirements/torch.txt" in command[-1] for command in from_index)
    assert all("--no-deps" in command for command in commands)


@pytest.mark.parametrize("target", TARGETS)
def test_images_run_as_a_numeric_user_that_is_not_root(target: str) -> None:
    user = last(image_steps(target), "USER")
    assert user is not None
    assert all(part.isdecimal() and int(part) > 0 for part in user.split(":")), user


def test_the_engine_has_the_c_compiler_that_triton_needs() -> None:
    """Install it where Triton is; the API's image has no compiler."""
    packages = {target: " ".join(rest for name, rest in image_steps(target) if name == "RUN") for target in TARGETS}
    lock = (ROOT / "deploy" / "requirements" / "torch.txt").read_text()
    assert "\ntriton==" in lock
    assert re.search(
        r"if \[ -d \S+/site-packages/triton \]; then .*apt-get install .* gcc libc6-dev ", packages["engine"]
    )
    assert "gcc" not in packages["api"]


@pytest.mark.parametrize("target", TARGETS)
def test_images_start_glimmer_without_a_shell(target: str) -> None:
    steps = image_steps(target)
    assert json.loads(last(steps, "ENTRYPOINT") or "") == ["glimmer"]
    assert json.loads(last(steps, "CMD") or "") == [target]
    assert image_environment(target)["PYTHONUNBUFFERED"] == "1"


@pytest.mark.parametrize("target", TARGETS)
def test_the_environment_of_an_image_names_real_settings(target: str) -> None:
    ours = {name for name in image_environment(target) if name.startswith("GLIMMER_")}
    assert ours <= variables_of(target)


def test_bases_are_pinned_to_a_minor_version_that_the_project_supports() -> None:
    supported = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    bases = {stage.base for stage in dockerfile().values()} - set(dockerfile())
    for base in bases:
        version = re.fullmatch(r"python:3\.(\d+)-slim-\w+", base)
        assert version, base
        assert supported == ">=3.11,<3.13"
        assert int(version[1]) in (11, 12)


@pytest.mark.parametrize("target", TARGETS)
def test_copied_files_exist_and_reach_the_builder(target: str) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    stages = ("build", f"build-{target}", target)
    copies = [shlex.split(rest) for name in stages for step, rest in dockerfile()[name].steps if step == "COPY"]
    sources = {word for words in copies if not words[0].startswith("--from=") for word in words[:-1]}
    assert sources >= {"pyproject.toml", "server", "engine"}
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source == name or source.startswith(f"{name}/") for name in allowed), source


@pytest.mark.parametrize(("target", "command"), [("api", ["health"]), ("engine", ["health", "--engine"])])
def test_the_health_check_is_glimmer_health(target: str, command: list[str]) -> None:
    check = last(dockerfile()[target].steps, "HEALTHCHECK")
    assert check is not None
    assert json.loads(check[check.index("CMD") + len("CMD") :]) == ["glimmer", *command]
