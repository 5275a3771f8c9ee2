from engine.device_errors import is_out_of_memory
from engine.errors import RequestError, StoreFailed, UnreadableJob, WriteRefused
from engine.jobs.job import STORE_UNAVAILABLE, UNREADABLE_JOB, JobError, JobSpec
from models.errors import NonFiniteError


def to_job_error(error: Exception, spec: JobSpec) -> JobError:
    """Map an exception to the client's error, without its text, which may quote a prompt."""
    if isinstance(error, RequestError):
        return JobError(error.message, "invalid_request_error", error.code, error.param)
    if isinstance(error, WriteRefused):
        return JobError(
            f"The queue has no room for {_images(spec)} of {spec.width}x{spec.height}. {_advice(spec)}, or for jpeg "
            "or webp.",
            code="result_too_large",
        )
    if isinstance(error, StoreFailed):
        return JobError("The storage of images took none for a minute. Try again.", code=STORE_UNAVAILABLE)
    if isinstance(error, UnreadableJob):
        return UNREADABLE_JOB
    if is_out_of_memory(error):
        return JobError(
            f"The engine's device has not enough memory for {_images(spec)} of {spec.width}x{spec.height}. "
            f"{_advice(spec)}.",
            code="out_of_memory",
        )
    if isinstance(error, NonFiniteError):
        return JobError(
            "The model's numbers overflowed on this request, so there is no image. Another seed or a guidance_scale "
            "nearer to 1 may help.",
            code="numerical_error",
        )
    return JobError("The engine failed on this request.", code="engine_error")


def _images(spec: JobSpec) -> str:
    return f"{spec.n} images" if spec.n > 1 else "an image"


def _advice(spec: JobSpec) -> str:
    ways = ["a smaller size"]
    if spec.n > 1:
        ways.append("fewer images (n)")
    if spec.num_sources:
        ways.append("an edit of fewer or smaller images")
    return "Ask for " + " or ".join(ways)
