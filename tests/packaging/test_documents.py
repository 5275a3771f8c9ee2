"""The documents: their links lead somewhere, and the files they name exist."""

import re
from pathlib import Path

import pytest

from tests.packaging.files import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("models/*/README.md")])
FOLDERS = ("server", "engine", "models", "deploy", "tests", "benchmarks", "docs")
NAMES_OLD_FILES = "CHANGELOG.md"


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


@pytest.mark.parametrize(
    "page", [page for page in DOCUMENTS if page.name != NAMES_OLD_FILES], ids=lambda page: str(page.relative_to(ROOT))
)
def test_named_files_exist(page: Path) -> None:
    for name in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", prose(page)):
        assert (ROOT / name).exists(), f"{page.name} names {name}"
    for name in re.findall(r"-m ((?:benchmarks|tests|models|server)[\w.]+)", page.read_text()):
        assert any((ROOT / name.replace(".", "/")).with_suffix(end).exists() for end in (".py", "")), name


def test_the_list_of_clients_is_that_of_the_tests() -> None:
    clients = (ROOT / "docs/api.md").read_text().partition("## Clients")[2]
    assert set(re.findall(r"\(\.\./(tests/clients/\w+\.py)\)", clients)) == {
        str(path.relative_to(ROOT)) for path in ROOT.glob("tests/clients/test_*.py")
    }
