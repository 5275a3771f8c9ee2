"""Images of results in object storage instead of Redis, by obstore (https://developmentseed.org/obstore).

Credentials, region and endpoint come from the variables of AWS. An object is written before the commit that refers to
it, under a key of its own for each claim: an engine whose claim was lost overwrites nothing.
"""

import logging
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from engine.errors import StartError, StoreUnavailable
from engine.jobs.result_store_url import split_result_store
from engine.jobs.results import StoredObject
from engine.observability.logs import event

logger = logging.getLogger("glimmer.results")

STORE_PROBE = "glimmer-probe"  # an object that each engine writes when it starts
CHECK_S = 10.0

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_CONNECT_S, _REQUEST_S = 3.0, 30.0
_LONGEST_LINK_S = 7 * 86_400  # of S3
_REPORT_AGAIN_S = 60.0


class ResultStore:
    """A bucket and a prefix. Methods raise `StoreUnavailable`.

    Args:
        url: see `check_result_store`.
        public_url: endpoint of the storage for clients, in links.

    Raises:
        StartError: obstore is not installed, or refuses the variables of AWS.
    """

    def __init__(self, url: str, public_url: str | None = None):
        bucket, prefix = split_result_store(url)
        try:
            import obstore.exceptions
            from obstore.store import S3Store
        except ImportError as error:
            raise StartError("GLIMMER_RESULT_STORE needs `pip install glimmer[s3]`") from error
        self._failures = obstore.exceptions.BaseError, OSError
        self._refusals = (
            FileNotFoundError, obstore.exceptions.PermissionDeniedError, obstore.exceptions.UnauthenticatedError
        )  # fmt: skip
        self._reported_at = -math.inf
        endpoint = _endpoint()

        def open_at(endpoint: str | None) -> Any:
            config: Any = {"aws_endpoint_url_s3": endpoint} if endpoint else {}
            return S3Store(
                bucket,
                prefix=prefix,
                config=config,
                client_options={
                    "allow_http": bool(endpoint and endpoint.startswith("http://")),
                    "connect_timeout": timedelta(seconds=_CONNECT_S),
                    "timeout": timedelta(seconds=_REQUEST_S),
                },
                retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=_REQUEST_S)},
            )

        try:
            self._store = open_at(endpoint)
            self._public = open_at(public_url) if public_url else self._store
        except (*self._failures, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise StartError(f"GLIMMER_RESULT_STORE cannot be opened: {reason}") from None

    async def check(self) -> None:
        """Write a small object. A storage that is away is only logged: it may come back.

        Raises:
            StartError: there is no such bucket, or it may not be written to.
        """
        try:
            await self._store.put_async(STORE_PROBE, b"")
        except self._refusals as error:
            raise StartError(
                f"GLIMMER_RESULT_STORE: the storage refuses to store an object ({type(error).__name__}); it needs an "
                "existing bucket, and AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or another source of credentials, "
                "that may put, get and delete objects"
            ) from None
        except self._failures as error:
            self._report(error)

    async def put(self, key: str, data: bytes, media_type: str) -> StoredObject:
        """Write an object; the same key may be written again."""
        attributes = {"Content-Type": media_type, "Cache-Control": "private, immutable"}
        with self._errors():
            await self._store.put_async(key, data, attributes=attributes, use_multipart=False)
        return StoredObject(key, len(data))

    async def get(self, key: str) -> bytes | None:
        """Return an object, None if it is gone."""
        with self._errors():
            try:
                response = await self._store.get_async(key)
            except FileNotFoundError:
                return None
            return bytes(await response.bytes_async())

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete objects, as far as that works: the rest is left to the bucket's lifecycle rule."""
        with suppress(StoreUnavailable):
            for key in keys:
                with self._errors(), suppress(FileNotFoundError):
                    await self._store.delete_async(key)

    async def link(self, key: str, seconds: float) -> str:
        """Return a presigned URL that is valid for so long."""
        import obstore

        with self._errors():
            expires_in = timedelta(seconds=min(seconds, _LONGEST_LINK_S))
            return await obstore.sign_async(self._public, "GET", key, expires_in)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._failures as error:
            self._report(error)
            raise StoreUnavailable(f"the result store fails: {type(error).__name__}") from None

    def _report(self, error: Exception) -> None:
        """Log an error, once in a while. Only its kind: the text may have a signature."""
        if time.monotonic() - self._reported_at > _REPORT_AGAIN_S:
            self._reported_at = time.monotonic()
            event(logger, "result_store_unavailable", logging.WARNING, error=type(error).__name__)


def open_result_store(url: str | None, public_url: str | None = None) -> ResultStore | None:
    """Return the store of the setting, if it is set."""
    return ResultStore(url, public_url) if url else None


def _endpoint() -> str | None:
    """Return the endpoint that the environment names, None for that of the region; raise StartError if it is no URL."""
    for name in _ENDPOINTS:
        if value := os.environ.get(name):
            if not re.fullmatch(r"https?://[^/\s]+/?", value):
                raise StartError(f"{name}: write it like https://minio.example.org:9000")
            return value
    return None


def object_key(job_id: str, epoch: int, index: int, extension: str) -> str:
    """Return the key of an image: its own for each claim of the job."""
    return f"{job_id}/{epoch}-{index}.{extension}"
