"""URLs of result stores."""

import re

_URL = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?P<prefix>(/[\w!.*'()-]+)*)/?")


def check_result_store(url: str | None) -> str | None:
    """Return the URL of a result store, None for an empty one; raise ValueError if it is something else."""
    if url:
        split_result_store(url)
    return url or None


def split_result_store(url: str) -> tuple[str, str | None]:
    """Return bucket and prefix. Raises as `check_result_store`."""
    if (parts := _URL.fullmatch(url)) is None:
        raise ValueError("write it like s3://bucket or s3://bucket/prefix")
    return parts["bucket"], parts["prefix"].strip("/") or None
