"""What a service is started with: where it listens, what is compiled, and its limits."""

from dataclasses import dataclass, field

from fastdrive_jax.configs import check_least
from fastdrive_jax.errors import UserError
from fastdrive_jax.inference.latency import check_target
from fastdrive_jax.pruning.select import num_keep


@dataclass(frozen=True)
class Limits:
    """Limits on what a client may ask of the service.

    Attributes:
        body_mb: Maximum size of a request.
        bodies_mb: Maximum size of all requests whose images are not decoded yet; one that does not
            fit is told to come back.
        megapixels: Maximum size of an image, checked before it is decoded.
        queue: Frames that may wait for the model; further ones are told to come back.
        body_seconds: Time limit for receiving a request's body.
        answer_seconds: Time limit for a waiting request.
        drives: Drives whose memory is kept; the one silent for longest is dropped first.
        drive_seconds: Silence after which a drive is forgotten.
        connections: Plan requests open at once, from headers to response; further ones are told to
            come back before their bodies are read.
    """

    body_mb: float = 32.0
    bodies_mb: float = 512.0
    megapixels: float = 16.0
    queue: int = 64
    body_seconds: float = 10.0
    answer_seconds: float = 10.0
    drives: int = 64
    drive_seconds: float = 60.0
    connections: int = 128

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:  # nor is what is no number
                raise UserError(f"limits.{name}={value} must be positive.")
        if self.bodies_mb < self.body_mb:
            raise UserError(
                f"limits.bodies_mb={self.bodies_mb:g} must hold a request of "
                f"limits.body_mb={self.body_mb:g}: raise it, or lower that."
            )

    @property
    def body_bytes(self) -> int:
        """Bytes of a whole request."""
        return int(self.body_mb * 2**20)


@dataclass(frozen=True)
class ServeConfig:
    """Configuration of a service.

    Attributes:
        host: Address to listen on; loopback unless set, because there is no authentication.
        port: Port to listen on; 0 picks a free one.
        ratios: Keep ratios to compile.
        target_ms: Time limit for a frame in milliseconds, from its arrival; decides the ratio if a
            request gives neither a ratio nor a target.
        max_batch: Maximum number of frames planned at once.
        max_wait_ms: Maximum time a frame waits for others to share its batch.
        seed: Seed of methods that draw random numbers.
        limits: Limits on requests.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    ratios: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    target_ms: float | None = None
    max_batch: int = 4
    max_wait_ms: float = 2.0
    seed: int = 0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self):
        for ratio in self.ratios:
            num_keep(1000, ratio)
        if not self.ratios or len(set(self.ratios)) != len(self.ratios):
            raise UserError(f"ratios={self.ratios} must name each wanted keep ratio once.")
        if self.target_ms is not None:
            check_target(self.target_ms)
        if not 0 <= self.port < 2**16:
            raise UserError(f"port={self.port} must be in 0..65535.")
        check_least(self, max_batch=1)
        if not self.max_wait_ms >= 0 or self.seed < 0:
            raise UserError(
                f"max_wait_ms={self.max_wait_ms} and seed={self.seed} must not be negative."
            )
        connections, queue = self.limits.connections, self.limits.queue
        if connections <= queue + self.max_batch:  # the queue's limit could not be reached
            raise UserError(
                f"limits.connections={connections} must be more than the limits.queue={queue} that "
                f"wait and the max_batch={self.max_batch} that are planned: raise it, or lower "
                "those."
            )

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Sizes that are compiled: powers of two, and the largest."""
        powers = [2**k for k in range(self.max_batch.bit_length()) if 2**k < self.max_batch]
        return (*powers, self.max_batch)
