"""`make demo`: start `glimmer serve`, request one image over HTTP, and always stop the server.

A free port and a temporary queue keep it apart from others.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

PROMPT = 'a blue poster, top headline "GLIMMER", center a large yellow star, bottom footer "HELLO" on a red bar'
IMAGE = Path("out/demo.png")
LOG = Path("out/demo.log")
READY = re.compile(r"^Glimmer is ready at (http://\S+)", re.MULTILINE)
START_TIMEOUT_S, STOP_TIMEOUT_S = 300.0, 45.0
GLIMMER = (sys.executable, "-m", "server.cli")


@contextmanager
def running_server(data_dir: Path) -> Iterator[str]:
    """Yield the URL of a ready server and stop it in the end; exit with its log if it does not start."""
    command = [*GLIMMER, "serve", "--host", "127.0.0.1", "--port", "0", "--data-dir", str(data_dir)]
    environment = {name: value for name, value in os.environ.items() if name != "GLIMMER_REDIS_URL"}
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("wb") as log:
        # Ctrl+C is for this process, which then stops the server.
        server = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield _url_when_ready(server)
    finally:
        _stop(server)


def _url_when_ready(server: subprocess.Popen[bytes]) -> str:
    timeout_at = time.monotonic() + START_TIMEOUT_S
    while server.poll() is None and time.monotonic() < timeout_at:
        if ready := READY.search(LOG.read_text(errors="replace")):
            return ready[1]
        time.sleep(0.1)
    reason = f"ended with code {server.returncode}" if server.returncode is not None else "took too long"
    sys.exit(f"The server did not start: it {reason}. The end of {LOG}:\n{LOG.read_text(errors='replace')[-2000:]}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGINT)  # to it alone
    try:
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()  # its engines and its Redis end with it
        server.wait()


def main() -> None:
    """Generate the image and print where it is; exit with a nonzero code on failure."""
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, _exit)
    IMAGE.parent.mkdir(exist_ok=True)
    print("Starting a server on this machine with the small model that is shipped", flush=True)
    with tempfile.TemporaryDirectory(prefix="glimmer-demo-") as data_dir, running_server(Path(data_dir)) as url:
        print(f"Requesting from {url}: {PROMPT}", flush=True)
        code = subprocess.run([*GLIMMER, "generate", PROMPT, "--output", str(IMAGE), "--url", url]).returncode
        if code != 0:
            sys.exit(f"No image was generated; the server's log is {LOG}.")
    print(f"""
The image is {IMAGE}. The small model draws posters: up to two lines of text and two shapes, in ten colours. Next:
  make serve                                     keeps a server running, for requests such as this one:
  .venv/bin/glimmer generate 'a pink poster, headline "OPEN", a small teal circle, footer "TODAY"' -o open.png
  make serve ARGS='--model zai-org/GLM-Image'    serves the published model, on a large GPU""")


def _exit(sig: int, _: object) -> NoReturn:
    """Exit through the `finally` that stops the server."""
    sys.exit(128 + sig)


if __name__ == "__main__":
    main()
