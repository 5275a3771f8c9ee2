"""Commands in environments that nobody planned for: they work, or end in one line and exit code 2, leaving nothing."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from engine.checkpoint_files import check_checkpoint
from engine.errors import StartError
from models.nano import CHECKPOINT
from server.settings import ServerSettings, is_service_link
from tests.packaging.files import ROOT
from tests.server.test_cli import glimmer

GLIMMER = f"{shlex.quote(sys.executable)} -m server.cli"
SOCKS = {"ALL_PROXY": "socks5://127.0.0.1:1"}
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


def processes(tag: str) -> list[str]:
    """Return the command lines of running processes that inherited the tag."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if tag.encode() in (folder / "environ").read_bytes() and "State:\tZ" not in (folder / "status").read_text():
                found.append((folder / "cmdline").read_text())
        except OSError:
            continue
    return found


# A shell command for {glimmer}, the environment's changes, and what the line names.
CASES: dict[str, tuple[str, dict[str, str], str]] = {
    "home that cannot be written": ("serve --port PORT", {"HOME": "/proc"}, "--data-dir"),
    "home that is no folder": ("serve --port PORT", {"HOME": "/dev/null"}, "--data-dir"),
    "folder for data that is gone": ("cd gone && rmdir ../gone && serve --port PORT --data-dir x", {}, "--data-dir"),
    "name that is too long": (f"serve --port PORT --data-dir {'x' * 300}", {}, "--data-dir"),
    "few open files": ("ulimit -n 24 && serve --port PORT --data-dir data", {}, "ulimit -n"),
    "full stdout": ("key alice >/dev/full 2>&1 | cat; key alice 2>&1 >/dev/full | tail -1 >&2; exit 2", {}, "space"),
    "pipe in place of a file": ("mkfifo gone/redis.log && serve --port PORT --data-dir gone", {}, "redis.log"),
    "engines beyond number": ("serve --port PORT --data-dir data --engines 99999999999", {}, "GLIMMER_ENGINES"),
    "proxy that needs a library": ("generate x --url http://example.invalid", SOCKS, "httpx[socks]"),
    "proxy of no known kind": ("generate x --url http://example.invalid", {"ALL_PROXY": "foo://x"}, "ALL_PROXY"),
    "certificates that are none": ("generate x --url https://x.invalid", {"SSL_CERT_FILE": os.devnull}, "SSL_CERT"),
    "library that is missing": ("generate x", {"PYTHONPATH": "no_httpx"}, "httpx is not installed"),
    "library of an engine that is missing": ("engine --redis-url unix:///x", {"PYTHONPATH": "no_torch"}, "[engine]"),
    "library that cannot be loaded": ("engine --redis-url unix:///x", {"PYTHONPATH": "bad_torch"}, "[engine]"),
    "installation without a library": ("key alice", {"PYTHONPATH": "no_orjson"}, "orjson"),
    "port in letters": ("api --redis-url unix:///x", {"GLIMMER_PORT": "http"}, "GLIMMER_PORT"),
    "device of no known kind": ("serve --port PORT --data-dir data --device gpu", {}, "GLIMMER_DEVICE"),
    "number format of no known kind": ("engine --redis-url unix:///x", {"GLIMMER_DTYPE": "fp8"}, "GLIMMER_DTYPE"),
    "checkpoint that is missing": ("serve --port PORT --data-dir data --model /nowhere", {}, "/nowhere"),
}
MODULES = {
    "no_orjson/orjson.py": "raise ModuleNotFoundError('none', name='orjson')",
    "no_httpx/httpx.py": "raise ModuleNotFoundError('none', name='httpx')",
    "no_torch/torch.py": "raise ModuleNotFoundError('none', name='torch')",
    "bad_torch/torch.py": "raise OSError('libcudart.so.12: cannot open shared object file')",
}


@pytest.mark.parametrize("name", CASES)
def test_a_start_that_fails_says_why_on_one_line_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    script, variables, expected = CASES[name]
    (tmp_path / "gone").mkdir()
    for file, text in MODULES.items():
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(text)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = re.sub(r"\b(serve|api|engine|generate|key)\b(?= )", rf"{GLIMMER} \1", script.replace("PORT", str(port)))
    tag = uuid.uuid4().hex
    path = os.pathsep.join(filter(None, (str(tmp_path / variables.get("PYTHONPATH", "")), str(ROOT))))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("GLIMMER_", "XDG_"))}
    ended = subprocess.run(
        ["bash", "-c", script],
        env=environment | variables | {"PYTHONPATH": path, "TEST_TAG": tag},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("glimmer: ")
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert expected in ended.stderr
    assert not processes(tag)
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize("arguments", [["--nope"], ["nope"], ["api", "--nope"], ["serve", "--port", "x"], ["key"]])
def test_wrong_options_are_one_line_that_names_the_help(arguments: list[str]) -> None:
    ended = glimmer(*arguments)
    assert (ended.exit_code, ended.stderr.count("\n")) == (2, 1), ended.output
    assert "--help" in ended.stderr


@pytest.mark.parametrize("name", ["redis_url", "api_key", "cors_origins", "allowed_hosts", "prompt_rewriter_model"])
def test_a_setting_that_is_not_utf_8_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("GLIMMER_REDIS_URL", "unix:///x")
    monkeypatch.setenv(f"GLIMMER_{name.upper()}", "redis://h\udcff")
    ended = glimmer("api")
    assert (ended.exit_code, ended.stderr) == (2, f"glimmer: GLIMMER_{name.upper()}: the value is not valid UTF-8\n")


def test_a_reader_that_has_gone_is_no_error_of_its_own(tmp_path: Path) -> None:
    script = f"({GLIMMER} key alice 2>/dev/null; echo $? >&2) | true"
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.stderr in ("0\n", "1\n")


class TestNamesOfKubernetes:
    """A Service called glimmer, or glimmer-anything, sets variables in each pod of its namespace."""

    PRODUCED = re.compile(
        r"GLIMMER(_\w+)?(_SERVICE_HOST|_SERVICE_PORT(_\w+)?|_PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
    )

    def test_no_setting_has_a_name_that_a_service_can_take(self) -> None:
        document = (ROOT / "docs" / "settings.md").read_text()
        names = set(re.findall(r"GLIMMER_[A-Z0-9_]+", document))
        assert len(names) > 30
        assert {name for name in names if self.PRODUCED.fullmatch(name)} == {"GLIMMER_PORT"}
        assert is_service_link("GLIMMER_PORT", "tcp://10.0.0.1:80")

    @pytest.mark.parametrize("link", ["tcp://10.0.0.1:80", "udp://10.0.0.1:80", "sctp://[fd00::1]:80"])
    @pytest.mark.parametrize("command", ["api", "engine", "serve", "health"])
    def test_every_command_starts_beside_such_services(
        self, monkeypatch: pytest.MonkeyPatch, command: str, link: str
    ) -> None:
        for service in ("GLIMMER", "GLIMMER_REDIS", "GLIMMER_API"):
            port = f"{service}_PORT_8000_{link.partition(':')[0].upper()}"
            monkeypatch.setenv(f"{service}_SERVICE_HOST", "10.0.0.1")
            monkeypatch.setenv(f"{service}_SERVICE_PORT", "8000")
            monkeypatch.setenv(f"{service}_PORT", link)
            monkeypatch.setenv(port, link)
            monkeypatch.setenv(f"{port}_ADDR", "10.0.0.1")
        assert ServerSettings().port == 8000
        started = glimmer(command, *(["--ready"] if command == "health" else ["--redis-url", "redis://host:abc/0"]))
        assert ("GET /health" if command == "health" else "GLIMMER_REDIS_URL") in started.stderr  # it has come so far

    @pytest.mark.parametrize("value", ["tcp", "http://10.0.0.1:80", "80a"])
    def test_other_ports_are_still_refused(self, value: str) -> None:
        ended = glimmer("api", "--redis-url", "unix:///x", GLIMMER_PORT=value)
        assert (ended.exit_code, ended.stderr.count("\n")) == (2, 1)
        assert "GLIMMER_PORT" in ended.stderr

    def test_an_address_in_another_setting_is_not_ignored(self) -> None:
        assert not is_service_link("GLIMMER_REDIS_URL", "tcp://10.0.0.1:6379")


class TestCheckpointFiles:
    @pytest.fixture
    def copy(self, tmp_path: Path) -> Path:
        """Links to the shipped files: each test replaces one."""
        return Path(shutil.copytree(CHECKPOINT, tmp_path / "copy", copy_function=os.symlink))

    def test_whole_ones_and_hub_ids_are_taken(self, copy: Path) -> None:
        for model in (None, "", str(CHECKPOINT), str(copy), "zai-org/GLM-Image"):
            check_checkpoint(model)

    @pytest.mark.parametrize("file", [WEIGHTS, "model_index.json", "processor/tokenizer.json", "vae/config.json"])
    def test_a_pointer_of_git_lfs(self, copy: Path, file: str) -> None:
        self.replace(copy / file, LFS_POINTER)
        with pytest.raises(StartError, match=rf"{file} is a Git LFS pointer.*`git lfs pull`"):
            check_checkpoint(str(copy))

    @pytest.mark.parametrize("kept", [0, 3, 8, 100, 50_000, -1])
    def test_weights_that_are_cut_off(self, copy: Path, kept: int) -> None:
        self.replace(copy / WEIGHTS, (CHECKPOINT / WEIGHTS).read_bytes()[:kept])
        with pytest.raises(StartError, match=rf"{WEIGHTS} .*download the checkpoint again"):
            check_checkpoint(str(copy))

    @pytest.mark.parametrize("content", [b"PK\x03\x04pickle", b"\x10" + b"\0" * 7 + b"[1]", b"<html>not found</html>"])
    def test_weights_of_another_format(self, copy: Path, content: bytes) -> None:
        self.replace(copy / WEIGHTS, content)
        with pytest.raises(StartError, match=WEIGHTS):
            check_checkpoint(str(copy))

    def test_a_file_of_the_hub_s_cache_that_was_deleted(self, copy: Path) -> None:
        (copy / WEIGHTS).unlink()
        (copy / WEIGHTS).symlink_to("/nowhere")
        with pytest.raises(StartError, match=f"{WEIGHTS} is a link to a file that is missing"):
            check_checkpoint(str(copy))

    def test_files_that_an_engine_does_not_read_are_left_alone(self, copy: Path) -> None:
        (copy / "vae" / "model.safetensors.index.json").write_text('{"weight_map": {"x": "other.safetensors"}}')
        self.replace(copy / WEIGHTS, LFS_POINTER)
        (copy / "README.md").write_bytes(LFS_POINTER)
        os.mkfifo(copy / "vae" / "pipe.json")
        check_checkpoint(str(copy))

    @pytest.mark.parametrize(
        "name", ["/nowhere", "./nowhere", "a/b/c", "~nobody-at-all/x", "two words", "nul\0", "/etc"]
    )
    def test_what_is_no_checkpoint(self, name: str) -> None:
        with pytest.raises(StartError, match="GLIMMER_MODEL") as caught:
            check_checkpoint(name)
        assert "\n" not in str(caught.value)

    @staticmethod
    def replace(file: Path, content: bytes) -> None:
        file.unlink()
        file.write_bytes(content)
