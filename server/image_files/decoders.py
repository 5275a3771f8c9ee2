"""Decoding images in processes that can be killed."""

import asyncio
import logging
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress

from engine.child import die_with_parent
from engine.observability.logs import event
from server.admission.turns import Turns
from server.errors import ApiError, invalid_image, unavailable
from server.image_files.decode_protocol import Frame, decode_reply, encode_request, receive_frame
from server.image_files.edit_input import EditFiles, EditInput, InvalidImage

PLACES = 3
PLACES_PER_CALLER = 2 if (os.cpu_count() or 1) > 2 else 1  # leaves a place and a processor to others
DECODE_TIMEOUT_S = 30.0  # of an edit, by the clock; `decode_worker.MAX_CPU_S` ends most before
TURN_TIMEOUT_S = 60.0  # for a place
EXIT_TIMEOUT_S = 2.0
BUSY_RETRY_S = 5

COMMAND = (sys.executable, "-W", "ignore", "-m", "server.image_files.decode_worker")
# No secrets for a process that reads hostile files.
_ENVIRONMENT = ("PATH", "HOME", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LANG")
_CHUNK_BYTES = 2**18  # asyncio copies what it cannot write at once

logger = logging.getLogger("glimmer.decoders")


class _WorkerDied(Exception):
    """The process ended, with an exit status, at a file (field and name), if any."""

    def __init__(self, file: tuple[str, str] | None, status: int) -> None:
        super().__init__()
        self.file, self.status = file, status


class _Worker:
    """A decode process. After a failed or cancelled `decode` it must be killed."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.file: tuple[str, str] | None = None  # field and name

    @classmethod
    async def start(cls, command: Sequence[str]) -> "_Worker":
        return cls(
            await asyncio.create_subprocess_exec(
                *die_with_parent(command, signal.SIGKILL),
                stdin=PIPE,
                stdout=PIPE,
                limit=4 * _CHUNK_BYTES,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                start_new_session=True,  # Ctrl+C is for the API alone
            )
        )

    async def decode(self, files: EditFiles) -> Frame:
        """Return the reply; raise `EOFError` or `ConnectionError` if the process ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.file = None
        for part in encode_request(files):
            for start in range(0, len(part), _CHUNK_BYTES):
                self._process.stdin.write(memoryview(part)[start : start + _CHUNK_BYTES])
                await self._process.stdin.drain()
        while "name" in (frame := await receive_frame(self._process.stdout))[0]:
            self.file = (frame[0]["param"], frame[0]["name"])
        return frame

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()

    async def wait(self) -> int:
        """Return the exit status; kill the process after `EXIT_TIMEOUT_S`."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(EXIT_TIMEOUT_S):
                return await self._process.wait()
        except TimeoutError:
            self.kill()
            return await self._process.wait()


class Decoders:
    """Decode processes, started when needed: at most one for each place."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._command = command
        self._turns = Turns(PLACES, PLACES_PER_CALLER)
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._ending: set[asyncio.Task[int]] = set()

    async def decode(self, owner: str, files: EditFiles, on_start: Callable[[], None] = lambda: None) -> EditInput:
        """Call `on_start` and decode the files at `owner`'s turn. Cancelling kills the process.

        Raises:
            ApiError: 400 naming the image; 503 without a free place or if the process dies for other reasons.
        """
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(TURN_TIMEOUT_S):
                    await stack.enter_async_context(self._turns.take(owner))
            except TimeoutError:
                raise unavailable("Too many images wait to be decoded; try again shortly.", BUSY_RETRY_S) from None
            on_start()
            try:
                return await self._decode(files)
            except InvalidImage as error:
                raise invalid_image(error.param, error.message) from None

    async def aclose(self) -> None:
        """Kill all processes."""
        for worker in (*self._idle, *self._busy):
            self._end(worker)
        self._idle.clear()
        await asyncio.gather(*self._ending)

    async def _decode(self, files: EditFiles) -> EditInput:
        for _ in range(2):  # an idle process may have died; the files are not to blame
            try:
                worker = self._idle.pop() if self._idle else await _Worker.start(self._command)
                return decode_reply(*await self._run(worker, files))
            except _WorkerDied as death:
                if death.file is not None:
                    raise _error(*death.file, death.status) from None
            except OSError as error:  # no memory or no room for a process
                event(logger, "decoder_not_started", logging.ERROR, reason=error)
                break
        raise _stopped()

    async def _run(self, worker: _Worker, files: EditFiles) -> Frame:
        """Keep the worker if it sends a reply, else kill it."""
        self._busy.add(worker)
        try:
            async with asyncio.timeout(DECODE_TIMEOUT_S):
                reply = await worker.decode(files)
        except TimeoutError:
            raise _WorkerDied(worker.file, -signal.SIGXCPU) from None
        except (EOFError, ConnectionError):
            raise _WorkerDied(worker.file, await worker.wait()) from None
        else:
            self._idle.append(worker)
            return reply
        finally:
            self._busy.discard(worker)
            if worker not in self._idle:
                self._end(worker)

    def _end(self, worker: _Worker) -> "asyncio.Task[int]":
        worker.kill()
        task = asyncio.create_task(worker.wait())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task


def _error(param: str, name: str, status: int) -> Exception:
    """Return the error for a process that ended at the file."""
    event(logger, "decoder_died", logging.WARNING, status=status)
    if status in (-signal.SIGKILL, -signal.SIGTERM):  # for want of memory or at a shutdown
        return _stopped()
    reason = "takes too long to decode" if status == -signal.SIGXCPU else "cannot be read: it crashes the decoder"
    return InvalidImage(param, f"{name} {reason}; save it again.")


def _stopped() -> ApiError:
    return unavailable("The images could not be decoded; try again shortly.", BUSY_RETRY_S)
