"""The operator's metrics.  No label holds a name that users choose, so their number is bounded."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

_LATENCY = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60)
_DURATION = (1, 10, 30, 60, 300, 900, 1800, 3600, 7200, 14400, 43200)
_PREFIX = "ckpt2pt_operator"


class Metrics:
    """All of them, in a registry of their own."""

    def __init__(self, version: str) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, namespace=_PREFIX, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, namespace=_PREFIX, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, namespace=_PREFIX, registry=registry, buckets=buckets)

        self.conversions = gauge(
            "conversions", "Conversions by phase; Following are those Running that follow a training.", "phase"
        )
        self.finished = counter("conversions_finished", "Conversions that ended.", "result", "reason")
        self.attempts = counter("stage_attempts", "Workers that ended.", "result", "reason")
        self.conversion_seconds = histogram(
            "conversion_duration_seconds", "From the first worker to the end.", _DURATION
        )
        self.stage_seconds = histogram("stage_duration_seconds", "One worker, from start to end.", _DURATION)
        self.converted_bytes = counter(
            "converted_bytes", "Bytes of source read by stages that are done, and for each checkpoint of a training."
        )
        self.queue_depth = gauge("queue_depth", "Conversions that wait to be looked at.")
        self.queue_latency = histogram("queue_latency_seconds", "From a change to the look at it.", _LATENCY)
        self.reconciles = counter("reconciles", "Looks at a conversion.", "result")
        self.reconcile_seconds = histogram("reconcile_duration_seconds", "One look at a conversion.", _LATENCY)
        self.api_requests = counter("api_requests", "Requests to the API server.", "verb", "resource", "code")
        self.api_forbidden = counter(
            "api_forbidden",
            "Requests that were forbidden, but for those into a namespace that goes.",
            "verb",
            "resource",
        )
        self.watch_last_event = gauge(
            "watch_last_event_timestamp_seconds", "When a watch last said anything, bookmarks included.", "resource"
        )
        self.status_writes = counter("status_writes", "Statuses written.")
        self.status_writes_suppressed = counter(
            "status_writes_suppressed", "Statuses not written, as nothing had changed."
        )
        Info("build", "What runs.", namespace=_PREFIX, registry=registry).info({"version": version})
