from ipaddress import IPv6Address, ip_address
from typing import TypeVar

Port = TypeVar("Port", int, int | None)


def is_loopback(host: str) -> bool:
    """Return whether `host`, an address or a name, belongs to this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def without_mapping(address: tuple[str, Port] | None) -> tuple[str, Port] | None:
    """Return an IPv4 address as such that a socket for both versions gives as `::ffff:`."""
    if address is None or not address[0].startswith("::ffff:"):
        return address
    mapped = IPv6Address(address[0]).ipv4_mapped
    return address if mapped is None else (str(mapped), address[1])


def authority(host: str, port: int) -> str:
    """Return `host:port` as in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
