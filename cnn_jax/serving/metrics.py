"""What a server counts, for Prometheus."""

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TENTHS = tuple(n / 10 for n in range(1, 11))


class ServerMetrics:
    """The metrics of one server, in a `registry` of its own."""

    def __init__(
        self,
        batch_sizes: Sequence[int],
        *,
        waiting: Callable[[], int],
        under_way: Callable[[], int],
    ) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "cnn_jax_requests", "Answers by status", ("route", "status"), registry=registry
        )
        self.request_seconds = Histogram(
            "cnn_jax_request_seconds",
            "From the end of a request's header to its answer",
            ("route",),
            buckets=SECONDS,
            registry=registry,
        )
        self.refused = Counter(
            "cnn_jax_refused", "Requests that were refused", ("reason",), registry=registry
        )
        self.batch_images = Histogram(
            "cnn_jax_batch_images", "Images of a batch", buckets=batch_sizes, registry=registry
        )
        self.batch_seconds = Histogram(
            "cnn_jax_batch_seconds", "Computation of a batch", buckets=SECONDS, registry=registry
        )
        Gauge(
            "cnn_jax_requests_under_way", "Requests without an answer yet", registry=registry
        ).set_function(under_way)
        Gauge(
            "cnn_jax_waiting_images", "Images that wait for their batch", registry=registry
        ).set_function(waiting)
        self.predicted = Counter(
            "cnn_jax_predicted", "Images by predicted class", ("class_name",), registry=registry
        )
        self.confidence = Histogram(
            "cnn_jax_confidence",
            "Probability of the predicted class",
            buckets=TENTHS,
            registry=registry,
        )
