"""From a validated request to a queued job."""

import logging
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import Request

from engine.jobs.job import EngineInfo, JobSpec
from engine.observability.logs import event
from server.admission.admission import Admitted, Idempotency
from server.admission.keys import Caller
from server.admission.memory_budget import Hold
from server.admission.rate_limits import Charge
from server.image_files.edit_input import EditFiles, EditInput
from server.requests.body import ParsedBody
from server.requests.schemas import EditRequest
from server.requests.text_warnings import text_warnings
from server.requests.validation import ValidatedRequest, smallest_job_spec, to_job_spec
from server.responses.disconnect import cancel_on_disconnect
from server.responses.images import ResponseOptions, new_file_tokens
from server.services import Services

logger = logging.getLogger("glimmer.images")
T = TypeVar("T")


@dataclass(frozen=True)
class Submission:
    """A validated request.

    Its images are decoded and its prompt is rewritten only when it is charged and would be accepted. After that it
    stays charged, so that both happen at most as often as the key's limit allows.

    Args:
        with_partials: the client can receive partial images.
        waits: only this connection brings the client its result.
        held: the request's memory.
    """

    request: Request
    services: Services
    body: ParsedBody
    validated: ValidatedRequest
    idempotency: Idempotency | None
    with_partials: bool
    waits: bool
    held: Hold

    async def submit(self) -> Admitted:
        """Return the job, perhaps of an earlier request with the same idempotency key.

        Raises:
            ApiError: 400 for an image or a plan; 429 at a limit; 503 without an engine or room to decode.
            ClientDisconnect: during expensive work without an idempotency key.
        """
        engine = await self.services.queue_state.require_engine(may_be_absent=self.services.settings.scale_to_zero)
        spec = smallest_job_spec(self.validated, engine) if self._is_edit else self._job_spec(engine)
        if (job_id := await self._check_room()) is not None:
            return Admitted(job_id, attached=True)
        admission = self.services.admission
        charge = await admission.charge(self._caller, spec)
        self.request.state.response_headers = charge.headers
        edit, revised_prompt = None, None
        try:
            if self._is_edit:
                edit = await self._while_connected(self._decode(charge))
                spec = self._job_spec(engine, edit)
                await admission.top_up(charge, spec)
            if self._wants_rewriting:
                revised_prompt = await self._while_connected(self._rewrite(charge))
        except BaseException:
            await admission.refund(charge)
            raise
        spec = spec if revised_prompt is None else replace(spec, prompt=revised_prompt)
        warnings = text_warnings(spec.prompt, spec.quotes, engine.max_text_characters)
        return await self._enqueue(spec, charge, edit, revised_prompt, warnings)

    @property
    def _caller(self) -> Caller:
        return self.request.state.caller

    @property
    def _is_edit(self) -> bool:
        return isinstance(self.body.request, EditRequest)

    @property
    def _wants_rewriting(self) -> bool:
        """Return whether to ask for a richer prompt. A plan leaves nothing to describe; an edit's prompt describes a
        change and is rewritten only on request."""
        wanted = self.body.request.rewrite_prompt
        if self.services.rewriter is None or self.body.request.plan is not None:
            return False
        return not self._is_edit if wanted is None else wanted

    def _job_spec(self, engine: EngineInfo, edit: EditInput | None = None) -> JobSpec:
        return to_job_spec(self.validated, engine, edit, with_partials=self.with_partials)

    async def _check_room(self) -> str | None:
        """Look for room if expensive work comes before `submit`, which also looks."""
        if not self._is_edit and not self._wants_rewriting:
            return None
        return await self.services.admission.check_room(self._caller, self.idempotency, has_sources=self._is_edit)

    async def _while_connected(self, work: Coroutine[Any, Any, T]) -> T:
        """Await the work; if the client disconnects, cancel it, unless a repeated request can find the job."""
        return await (cancel_on_disconnect(self.request.receive, work) if self.idempotency is None else work)

    async def _decode(self, charge: Charge) -> EditInput:
        files = EditFiles(self.body.images, self.body.mask, self.validated.size, self.services.settings.max_pixels)
        edit = await self.services.decoders.decode(self._caller.owner, files, charge.work)
        self.body.images.clear()  # the decoded images take their place
        self.held.resize(edit.source_images.size + len(self.body.mask or b""))
        return edit

    async def _rewrite(self, charge: Charge) -> str | None:
        assert self.services.rewriter is not None
        prompt, quotes = self.body.request.prompt, self.body.request.quotes
        return await self.services.rewriter.rewrite(prompt, self._caller.owner, charge.work, quotes)

    async def _enqueue(
        self, spec: JobSpec, charge: Charge, edit: EditInput | None, revised_prompt: str | None, warnings: list[str]
    ) -> Admitted:
        response_format = self.validated.response_format
        options = ResponseOptions(
            operation="edit" if edit else "generation",
            quality=self.validated.quality,
            response_format=response_format,
            base_url=self.services.base_url(self.request),
            revised_prompt=revised_prompt,
            file_tokens=new_file_tokens(spec.n) if response_format == "url" else [],
            warnings=warnings,
        )
        job = await self.services.admission.submit(
            spec,
            self.validated.timeout_s,
            self.body.request.priority,
            charge,
            source_images=edit.source_images if edit else None,
            notes=options.to_dict(),
            idempotency=self.idempotency,
            origin=self.request.state.origin,
            waits=self.waits,
        )
        if not job.attached:
            _log_accepted(job.job_id, spec)
        return job


def _log_accepted(job_id: str, spec: JobSpec) -> None:
    event(
        logger,
        "job_accepted",
        job=job_id,
        n=spec.n,
        size=f"{spec.width}x{spec.height}",
        steps=spec.num_inference_steps,
        sources=spec.num_sources or None,
    )
