"""What clients of httpx take from the environment: proxies and certificates."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from engine.errors import StartError
from server.addresses import is_loopback


def uses_environment(url: httpx.URL) -> bool:
    """Return whether proxies apply: one would look for a loopback address on its own machine."""
    return not is_loopback(url.host)


@contextmanager
def environment_errors(failure: str, purpose: str) -> Iterator[None]:
    """Raise a `StartError` that names the variables if a client cannot be made with them."""
    try:
        yield
    except ImportError as error:
        raise StartError(
            f"{failure}: ALL_PROXY, HTTPS_PROXY or HTTP_PROXY cannot be used for {purpose}: a SOCKS proxy needs "
            f"`pip install httpx[socks]` ({error.name or 'socksio'} is not installed); set an http:// proxy, or list "
            "the host in NO_PROXY"
        ) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise StartError(
            f"{failure}: SSL_CERT_FILE, SSL_CERT_DIR or SSLKEYLOGFILE cannot be used for {purpose}: {reason}"
        ) from None
    except (ValueError, httpx.InvalidURL) as error:
        reason = " ".join(str(error).split())
        raise StartError(
            f"{failure}: ALL_PROXY, HTTPS_PROXY or HTTP_PROXY cannot be used for {purpose}: {reason}; write it like "
            "http://proxy.example.org:3128"
        ) from None
