"""What a request must be to be served, beyond what the API can know; a `RequestError` says what it is not."""

from engine.errors import RequestError
from engine.geometry import PATCH
from engine.limits import EngineLimits
from engine.request import Image, Request


def check_pictures(request: Request, limits: EngineLimits) -> None:
    """The pictures of an edit: as many as it says, and room for all of them."""
    if len(request.preprocessed) != request.spec.num_sources:
        raise RequestError(f"this edit of {request.spec.num_sources} pictures came with {len(request.preprocessed)}")
    needed, room = request.source_patches, limits.source_patches
    if needed > room:
        raise RequestError(
            f"the pictures to edit have {needed * PATCH**2} pixels, as the model sees them; this server has room "
            f"for {room * PATCH**2}. Send fewer or smaller pictures",
            param="image",
        )


def check_plan(image: Image, codes: int) -> None:
    """A plan that was given: of the image's size, and of tokens below `codes`."""
    plan, grid = image.plan, image.request.spec.geometry.plan
    if plan is None:
        return
    if (plan.rows, plan.cols, len(plan.tokens)) != (grid.rows, grid.cols, grid.tokens):
        raise RequestError(f"a plan of this size has {grid.rows} rows and {grid.cols} columns", param="plan")
    if not all(0 <= token < codes for token in plan.tokens):
        raise RequestError(f"the tokens of a plan are 0 to {codes - 1}", param="plan")
