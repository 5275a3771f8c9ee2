"""A process's streams, unhandled errors and end."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import typer

from engine.errors import QueueUnavailable, StartError
from engine.observability.logs import event, where
from server.cli.options import stop

logger = logging.getLogger("glimmer.serve")


def prepare_streams() -> None:
    """Open closed standard streams; let no character fail."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # else the next socket would get this number and children's output
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def one_line_errors(requirement: str = "reinstall glimmer") -> Iterator[None]:
    """Exit with one line and without a traceback, whose texts may quote a prompt.

    Args:
        requirement: what to do about a missing or broken library.
    """
    try:
        yield
    except typer.Exit:
        raise
    except ModuleNotFoundError as error:
        stop(f"{error.name} is not installed; {requirement}")
    except ImportError as error:
        stop(f"{error.name or 'a library'} cannot be imported ({_one_line(error)}); {requirement}")
    except (StartError, QueueUnavailable) as error:
        stop(_one_line(error))
    except Exception as error:
        event(logger, "broke", logging.CRITICAL, error=repr(error), where=where(error))
        stop(f"{type(error).__name__}: {_one_line(error)}", 1)


def end_process(code: int) -> NoReturn:
    """Exit without waiting for threads, as `sys.exit` would: one may hang in a device call or name lookup."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, full or none
            stream.flush()
    os._exit(code)


def _one_line(error: Exception) -> str:
    return str(error).replace("\n", " ")
