"""A process's streams, unhandled errors and end."""

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from engine.config import EXIT_CONFIGURATION
from engine.errors import QueueUnavailable, StartError
from engine.observability.logs import event, where
from server.cli.options import stop

_REMEDIES = {
    errno.EMFILE: "; raise the limit of open files (ulimit -n, LimitNOFILE)",
    errno.ENFILE: "; raise the machine's limit of open files (fs.file-max)",
    errno.ENOSPC: "; free space on that disk",
    errno.EDQUOT: "; free space within the quota of that disk",
    errno.EROFS: "; choose a place that can be written",
    errno.EACCES: "; give this user the permission, or choose another place",
    errno.EPERM: "; give this user the permission, or choose another place",
    errno.ENOMEM: "; this machine has too little memory",
    errno.EAGAIN: "; raise the limit of processes (ulimit -u, a container's limit)",
}

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


class OneLineGroup(TyperGroup):
    """Ends every command that fails, its options included, with one line."""

    def main(self, args: Any = None, *positional: Any, standalone_mode: bool = True, **more: Any) -> Any:
        try:
            with one_line_errors():
                code = super().main(args, *positional, standalone_mode=False, **more)
                if sys.stdout is not None:
                    sys.stdout.flush()  # a full disk shows here
        except typer.Exit as end:
            code = end.exit_code
        except typer.Abort:
            code = 1
        sys.exit(code)


@contextmanager
def one_line_errors(requirement: str = "reinstall glimmer") -> Iterator[None]:
    """Exit with one line and without a traceback, whose texts may quote a prompt.

    Errors of the system exit with 2, bugs with 1.

    Args:
        requirement: what to do about a missing or broken library.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except typer.TyperException as error:
        _stop_usage(error)
    except ModuleNotFoundError as error:
        stop(f"{error.name} is not installed; {requirement}")
    except ImportError as error:
        stop(f"{error.name or 'a library'} cannot be imported ({_one_line(error)}); {requirement}")
    except (StartError, QueueUnavailable) as error:
        stop(_one_line(error))
    except BrokenPipeError:
        raise typer.Exit(1) from None  # the reader has gone, as `head` does
    except (OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno is None:  # of a shared library
            stop(f"a library cannot be loaded ({_one_line(error)}); {requirement}")
        stop(_describe(error))
    except Exception as error:
        event(logger, "broke", logging.CRITICAL, error=repr(error), where=where(error))
        raise typer.Exit(1) from None


def end_process(code: int) -> NoReturn:
    """Exit without waiting for threads, as `sys.exit` would: one may hang in a device call or name lookup."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, full or none
            stream.flush()
    os._exit(code)


def _stop_usage(error: typer.TyperException) -> NoReturn:
    """Exit with the message of a wrong option or argument; print the help if there is none at all."""
    context = getattr(error, "ctx", None)
    if error.format_message().startswith("Usage: "):
        typer.echo(error.format_message(), err=True)
        raise typer.Exit(EXIT_CONFIGURATION)
    hint = f"; see {context.command_path} --help" if context else ""
    stop(f"{_one_line(error).rstrip('.')}{hint}")


def _describe(error: OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return "this machine has too little memory, or the process may not take it (ulimit -v, a container's limit)"
    reason = error.strerror or _one_line(error) or type(error).__name__
    file = f" ({os.fsdecode(error.filename)})" if isinstance(error.filename, str | bytes) else ""
    remedy = _REMEDIES.get(error.errno or 0, "")
    if reason.startswith("No usable temporary directory"):  # of `tempfile`
        remedy = "; set TMPDIR to a folder that can be written"
    return f"{reason}{file}{remedy}"


def _one_line(error: Exception) -> str:
    text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
    return " ".join(text.split("\n"))
