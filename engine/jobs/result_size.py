from engine.jobs.job import JobSpec, OutputFormat

# Upper bounds: noise at the highest quality. Photographs take a third.
_BYTES_PER_PIXEL: dict[OutputFormat, float] = {"png": 3.1, "jpeg": 2.2, "webp": 1.3}
_BYTES_PER_TOKEN = 8  # of a plan as JSON
_BYTES_BESIDE = 1024  # metadata of an image, and keys


def max_result_size(spec: JobSpec, *, copies: int = 1) -> int:
    """Return the bytes of a job's images and plans.

    Args:
        copies: of the final images.
    """
    image = _BYTES_PER_PIXEL[spec.output_format] * spec.width * spec.height + _BYTES_BESIDE
    plan = _BYTES_PER_TOKEN * spec.image_plan_tokens
    texts = 4 * len(spec.prompt) if spec.embed_prompt else 0
    return spec.n * round(copies * (image + texts + plan) + spec.partial_images * (image + plan) + plan)
