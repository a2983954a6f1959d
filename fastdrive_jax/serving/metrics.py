"""What Prometheus reads of the service; a registry of its own for each."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24)
_SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters and histograms of one service.

    Attributes:
        requests: Plans asked for, by HTTP status.
        refused: Those that were not served, by reason.
        seconds: Of a plan by stage: receive, decode, queue, model, and total.
        queue: Frames that wait.
        drives: That are remembered.
        kept: Share of the tokens that a frame kept.
        batch: Frames that were planned at once.
        load: See `inference.latency`.
        missed: Frames that took longer than their target, or were expected to.
    """

    def __init__(self):
        self.registry = CollectorRegistry()
        given = {"registry": self.registry}
        self.requests = Counter("fastdrive_requests", "Plans asked for.", ["code"], **given)
        self.refused = Counter("fastdrive_errors", "Plans not made.", ["reason"], **given)
        self.seconds = Histogram(
            "fastdrive_latency_seconds", "Seconds of a plan.", ["stage"], buckets=_SECONDS, **given
        )
        self.queue = Gauge("fastdrive_queue_depth", "Frames that wait.", **given)
        self.drives = Gauge("fastdrive_drives", "Drives that are remembered.", **given)
        self.kept = Histogram(
            "fastdrive_kept_ratio", "Share of tokens kept.", buckets=_SHARES, **given
        )
        self.batch = Histogram(
            "fastdrive_batch_size", "Frames planned at once.", buckets=_SIZES, **given
        )
        self.load = Gauge("fastdrive_load", "Expected over median time of a frame.", **given)
        self.missed = Counter("fastdrive_target_missed", "Frames over their target.", **given)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
