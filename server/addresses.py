from ipaddress import ip_address


def is_loopback(host: str) -> bool:
    """Return whether an address or name is this machine's alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
