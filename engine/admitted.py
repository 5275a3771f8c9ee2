from collections.abc import Iterator

from engine.request import Request


class AdmittedRequests:
    """Requests with images left to finish, in order of admission.

    Args:
        max_source_patches: of the source images of all.
    """

    def __init__(self, max_source_patches: int):
        self.max_source_patches = max_source_patches
        self._images_left: dict[Request, int] = {}

    def __iter__(self) -> Iterator[Request]:
        return iter(self._images_left)

    def __len__(self) -> int:
        return len(self._images_left)

    def fits(self, request: Request) -> bool:
        """Return whether its source images fit in memory."""
        admitted = sum(other.source_patches for other in self)
        return admitted + request.source_patches <= self.max_source_patches

    def add(self, request: Request) -> None:
        self._images_left[request] = request.spec.n

    def finish_image(self, request: Request) -> bool:
        """Count an image as finished; remove the request after its last one and return whether it was that."""
        self._images_left[request] -= 1
        if self._images_left[request]:
            return False
        del self._images_left[request]
        return True

    def discard(self, request: Request) -> None:
        self._images_left.pop(request, None)
