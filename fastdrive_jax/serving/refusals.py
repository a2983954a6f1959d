"""A request that is not served, as one sentence and an HTTP status."""

from collections.abc import Mapping

from fastdrive_jax.errors import UserError


class Refusal(UserError):
    """What a client did wrong, or why it must wait.

    Attributes:
        status: HTTP status.
        reason: One word, for metrics.
        headers: More headers of the answer.
    """

    def __init__(
        self, status: int, reason: str, sentence: str, headers: Mapping[str, str] | None = None
    ):
        super().__init__(sentence)
        self.status, self.reason, self.headers = status, reason, dict(headers or {})
