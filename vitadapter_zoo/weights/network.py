"""Check whether this machine can reach a server, without sending a request."""

import errno
import socket
import urllib.request
from urllib.parse import urlparse

# Errors of a machine without a network: another attempt would not help.
NO_NETWORK = (socket.EAI_NONAME, socket.EAI_AGAIN, errno.ENETUNREACH, errno.EHOSTUNREACH)


def reached_through(url: str) -> tuple[str, int]:
    """Return host and port of a server, or of the proxy in front of it."""
    address = urlparse(url)
    proxy = urllib.request.getproxies().get(address.scheme)
    if proxy and not urllib.request.proxy_bypass(address.hostname or ""):
        address = urlparse(proxy if "://" in proxy else f"http://{proxy}")
    return address.hostname or "", address.port or (443 if address.scheme == "https" else 80)


def no_route(url: str) -> str | None:
    """Return why this machine has no route to a server; None if it has one.

    Only the name is looked up; the server notices nothing.
    """
    host, port = reached_through(url)
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except OSError as error:
        return (error.strerror or str(error)) if error.errno in NO_NETWORK else None
    reason = None
    for family, _, _, _, address in addresses:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as channel:
                channel.connect(address)  # of a datagram: looks for a route and sends nothing
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            return None
    return reason
