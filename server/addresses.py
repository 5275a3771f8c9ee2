"""What an address says about who is behind it."""

from ipaddress import ip_address


def is_loopback(host: str) -> bool:
    """Whether only this machine can be at, or reach, this address or name."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
