"""A request's body within bounds of size and time, and the refusal of one beyond them."""

import asyncio
import json
from collections.abc import Collection

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from fastdrive_jax.serving.config import Limits
from fastdrive_jax.serving.refusals import Refusal

_LINGER_SECONDS = 1.0


class BoundedBody:
    """Receives a request, and refuses it as soon as it is too large or too slow.

    Attributes:
        held: Bytes of it in memory; whoever lets them go says so here.
        finished: Whether all of the body has come.
    """

    def __init__(self, receive: Receive, limits: Limits, bodies: Collection["BoundedBody"]):
        """Takes over `receive` of a request.

        Args:
            receive: Of the request.
            limits: On it, and on all of `bodies` together.
            bodies: All that are open, with this one.
        """
        self._receive, self._limits, self._bodies = receive, limits, bodies
        self._deadline = asyncio.get_running_loop().time() + limits.body_seconds
        self.held = 0
        self.finished = False

    def check_announced(self, length: str | None) -> None:
        """Refuses by the Content-Length alone, before anything is read.

        Raises:
            Refusal: 413.
        """
        if length is not None and length.isdigit() and int(length) > self._limits.body_bytes:
            raise self._too_large()

    async def __call__(self) -> Message:
        """The next part.

        Raises:
            Refusal: 413, 408 or 503.
        """
        left = self._deadline - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0))
        except TimeoutError as error:
            raise Refusal(
                408,
                "body_slow",
                f"The request did not come whole within {self._limits.body_seconds:g} s.",
            ) from error
        self.held += len(message.get("body", b""))
        self.finished = not message.get("more_body", False)
        if self.held > self._limits.body_bytes:
            raise self._too_large()
        if sum(body.held for body in self._bodies) > self._limits.bodies_mb * 2**20:
            raise Refusal(
                503,
                "busy",
                f"The open requests hold {self._limits.bodies_mb:g} MiB already; come back in a "
                "second.",
                {"Retry-After": "1"},
            )
        return message

    def _too_large(self) -> Refusal:
        return Refusal(
            413,
            "body_size",
            f"The request is larger than {self._limits.body_mb:g} MiB; send smaller pictures.",
        )


class RefusalResponse(Response):
    """A refusal as JSON; a connection whose body is not wanted any more is closed.

    Who closes while the other side still sends makes it lose what it was sent. So the answer goes
    out first, and what comes is thrown away for a moment before the connection is closed.
    """

    media_type = "application/json"

    def __init__(self, refusal: Refusal, body: BoundedBody | None = None):
        self._unread = body is not None and not body.finished
        close = {"Connection": "close"} if self._unread else {}
        content = json.dumps({"error": str(refusal), "reason": refusal.reason})
        super().__init__(content, refusal.status, {**refusal.headers, **close})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        if not self._unread:
            await super().__call__(scope, receive, send)
            return
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        try:
            async with asyncio.timeout(_LINGER_SECONDS):
                while (await receive()).get("more_body", False):
                    pass
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b""})
