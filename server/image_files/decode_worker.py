"""The process that decodes uploaded files: `python -m server.image_files.decode_worker`.

Contains what a file may do to its decoder: take long, take memory, crash it. Started and killed by `Decoders`.
"""

import contextlib
import math
import os
import resource
import sys
from pathlib import Path
from typing import BinaryIO

from server.image_files.decode_protocol import decode_request, encode_input, encode_refusal, encode_report, read_frame
from server.image_files.edit_input import EditFiles, InvalidImage
from server.image_files.images import prepare

MAX_MEMORY = 2**30  # address space; a PNG of 8192x8192 with alpha takes 0.8 GB
MAX_CPU_S = 10  # per edit; such a PNG takes 2.4 s, a JPEG of 48 megapixels 0.6 s


def main() -> None:
    """Answer requests from stdin on stdout until stdin ends."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not become a reply
    _limit_process()
    while (frame := read_frame(requests)) is not None:
        _limit_cpu_time()
        _answer(decode_request(*frame), replies)


def _answer(files: EditFiles, replies: BinaryIO) -> None:
    file = ("image", "The image")

    def report(param: str, name: str) -> None:
        nonlocal file
        file = (param, name)
        replies.write(encode_report(param, name))
        replies.flush()

    try:
        reply = encode_input(prepare(files.images, files.mask, files.size, files.max_pixels, report))
    except InvalidImage as error:
        reply = encode_refusal(error)
    except MemoryError:
        param, name = file
        reply = encode_refusal(InvalidImage(param, f"{name} takes too much memory to decode."))
    for part in reply:
        replies.write(part)
    replies.flush()


def _limit_process() -> None:
    os.nice(10)  # the API and engines come first
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold images
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # to be killed before the API


def _limit_cpu_time() -> None:
    """Let the kernel end this process with SIGXCPU, even if the API is gone or Pillow never returns."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(usage.ru_utime + usage.ru_stime) + MAX_CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    main()
