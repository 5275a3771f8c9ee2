"""An engine process without a model, started by the supervisor in tests: `fake_engine.py MODE --engine-id ID`.

Modes: `serve` is a stub engine until SIGTERM, `busy` one that keeps working after it, `patient` one until the second
(it writes a letter for each into the file FAKE_ENGINE_LOG.signals), `stubborn` ignores SIGTERM and
does nothing, `die` ends at once, `misconfigured` exits with the code for it, `hung` writes
its status once.
Every start appends a line to the file FAKE_ENGINE_LOG: engine id, pid, and three environment variables.
"""

import asyncio
import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.jobs.connection import connect
from engine.worker.status import EngineStatus
from tests.job_queue import JobQueue
from tests.server.stub_engine import StubEngine


async def serve(engine_id: str, mode: str) -> None:
    stopped, received = asyncio.Event(), Path(os.environ["FAKE_ENGINE_LOG"] + ".signals")

    def on_signal() -> None:
        if mode == "patient":
            with received.open("a") as file:
                file.write("x")
        if mode == "serve" or (mode == "patient" and received.stat().st_size >= 2):
            stopped.set()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, on_signal)
    redis = connect(os.environ["GLIMMER_REDIS_URL"])
    queue = JobQueue(redis)
    stub = StubEngine(queue, step_s=float(os.environ.get("FAKE_ENGINE_STEP_S", "0")))
    stub.info = dataclasses.replace(stub.info, id=engine_id)
    async with stub:
        await stopped.wait()
    await queue.deregister(engine_id)
    await queue.close()
    await redis.aclose()


def main() -> int:
    mode, engine_id = sys.argv[1], sys.argv[sys.argv.index("--engine-id") + 1]
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    variables = [os.environ.get(name, "-") for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "GLIMMER_API_KEY")]
    with Path(os.environ["FAKE_ENGINE_LOG"]).open("a") as log:
        print(engine_id, os.getpid(), *variables, file=log)
    if mode == "misconfigured":
        print("no checkpoint there", file=sys.stderr)
        return 2
    if mode in ("serve", "busy", "patient"):
        asyncio.run(serve(engine_id, mode))
    if mode == "hung":
        EngineStatus(engine_id).write()
    if mode in ("stubborn", "hung"):
        time.sleep(60)
    return 1 if mode == "die" else 0


if __name__ == "__main__":
    sys.exit(main())
