"""Who may ask: a browser on the same machine shows pages of any site, which can send requests."""

import ipaddress
import re
import socket

from starlette.requests import Request

from fastdrive_jax.serving.refusals import Refusal


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address, or all that a name stands for."""
    found = socket.getaddrinfo(host, None)
    return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)


def own_names(host: str) -> frozenset[str] | None:
    """Under which names the service at `host` is asked; None where that is not known."""
    if not is_loopback(host):
        return None
    return frozenset({"127.0.0.1", "localhost", "[::1]", host.lower()})


def check_host(request: Request, names: frozenset[str] | None) -> None:
    """Refuses a site that has given its own name this machine's address.

    Args:
        request: With its Host.
        names: Of `own_names`.

    Raises:
        Refusal: 400.
    """
    name = re.sub(r":\d*$", "", request.headers.get("host", "")).lower()
    if names is not None and name not in names:
        raise Refusal(400, "host", "Ask this service as localhost, or set its --host.")


def check_origin(request: Request) -> None:
    """Refuses another site's page: browsers send its forms here without asking whether they may.

    A plan changes what the service knows of its drive.

    Raises:
        Refusal: 403.
    """
    headers = request.headers
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    same = origin is None or origin.partition("://")[2] == headers.get("host")
    if site not in ("same-origin", "none") if site else not same:
        raise Refusal(403, "origin", "Pages of other sites may not ask for plans.")
