"""A decode worker that does what the first bytes of a file say instead of decoding it."""

import os
import signal
import time
from collections.abc import Callable

from server.image_files import decode_worker
from server.image_files.edit_input import EditInput
from server.image_files.images import prepare


def misbehave(
    images: list[bytes],
    mask: bytes | None,
    size: tuple[int, int] | None,
    max_pixels: int,
    report: Callable[[str, str], None],
) -> EditInput:
    report("image", "Image 1")
    order = images[0].partition(b" ")[0]
    if order == b"sleep":
        time.sleep(600)
    while order == b"spin":
        pass
    if order == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if order == b"allocate":
        bytearray(2 * decode_worker.MAX_MEMORY)
    if order == b"raise":
        raise RuntimeError
    return prepare(images, mask, size, max_pixels, report)


if __name__ == "__main__":
    decode_worker.prepare, decode_worker.MAX_CPU_S = misbehave, 1
    decode_worker.main()
