"""What the service counts, for Prometheus. One registry an application: two can share a process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SIZES = (1, 2, 4, 8, 16, 32)
_BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The metrics and the registry that holds them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Histogram(
            "hypersam_request_seconds", "Duration of HTTP requests", ("method", "route", "status"),
            buckets=_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.stages = Histogram(
            "hypersam_segment_stage_seconds", "Duration of the stages of requests for masks", ("stage", "model"),
            buckets=_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.uploaded = Counter("hypersam_uploaded_bytes_total", "Bytes of checkpoints taken in",
                                registry=self.registry)  # fmt: skip
        self.waiting = Gauge("hypersam_jobs_waiting", "Jobs that wait for a worker", registry=self.registry)
        self.workers = Gauge("hypersam_workers", "Workers that gave a sign of life", registry=self.registry)
        self._engine = EngineCollector()
        self.registry.register(self._engine)

    def segmented(self, model: str, timings: Mapping[str, float]) -> None:
        """Count one picture's masks; ``timings`` are milliseconds."""
        for stage, milliseconds in timings.items():
            if milliseconds:  # an embedding that was at hand took no encoding
                self.stages.labels(stage, model).observe(milliseconds / 1000)

    def forget(self, model: str) -> None:
        """Drop what was timed of a model that is gone: names come and go, and each would stay for ever."""
        self.stages.remove_by_labels({"model": model})

    def text(self, stats: Mapping[str, Any], waiting: int | None, workers: int | None) -> bytes:
        """Return everything in Prometheus's text format. What could not be asked is NaN."""
        self._engine.stats = stats
        self.waiting.set(float("nan") if waiting is None else waiting)
        self.workers.set(float("nan") if workers is None else workers)
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """The engine's own counts, as ``Engine.stats`` gives them at a scrape."""

    def __init__(self) -> None:
        self.stats: Mapping[str, Any] = {}

    def collect(self) -> Iterator[Metric]:
        """Turn the counts into metrics."""
        stats = self.stats
        if not stats:
            return
        for name, key, text in (
            ("hypersam_resident_bytes", "resident_bytes", "Bytes of models in memory"),
            ("hypersam_embeddings", "embeddings", "Embeddings in memory"),
            ("hypersam_embedding_bytes", "embedding_bytes", "Bytes of embeddings in memory"),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["model"])
            for model, held in stats["models"].items():
                gauge.add_metric([model], held[key])
            yield gauge
        lookups = CounterMetricFamily(
            "hypersam_embedding_lookups", "Embeddings that were held (hit), awaited (joined) or made (miss)",
            labels=["model", "result"],
        )  # fmt: skip
        for labels, count in stats["lookups"].items():
            lookups.add_metric(labels, count)
        yield lookups
        for name, key, text in (
            ("hypersam_batch_size", "batches", "Pictures that one call of the encoder took"),
            ("hypersam_decode_batch_size", "decodes", "Prompts that went to the decoder together"),
        ):
            yield _sizes(name, text, stats[key])
        queued = GaugeMetricFamily("hypersam_queue_length", "Tasks that wait for the device", labels=["stage", "model"])
        for labels, count in stats["queues"].items():
            queued.add_metric(labels, count)
        yield queued
        yield GaugeMetricFamily("hypersam_requests_inside", "Requests for masks taken in", stats["waiting"])
        for name, key, text in (
            ("hypersam_model_loads", "model_loads", "Models loaded into memory"),
            ("hypersam_rejected_requests", "rejected", "Requests refused since too many waited"),
            ("hypersam_abandoned_requests", "abandoned", "Requests whose client went away"),
            ("hypersam_memory_shortages", "memory_shortages", "Times that the device had no memory left"),
        ):
            yield CounterMetricFamily(name, text, stats[key])


def _sizes(metric: str, text: str, sizes: Mapping[tuple[str, int], int]) -> Metric:
    histogram = HistogramMetricFamily(metric, text, labels=["model"])
    for model in sorted({model for model, _ in sizes}):
        found = {size: count for (name, size), count in sizes.items() if name == model}
        buckets = [(str(float(bound)), sum(n for size, n in found.items() if size <= bound)) for bound in _SIZES]
        buckets.append(("+Inf", sum(found.values())))
        histogram.add_metric([model], buckets, sum(size * count for size, count in found.items()))
    return histogram


class MeasureRequests:
    """ASGI middleware that observes how long each request took, by route and not by path."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            method = scope["method"] if route != "unknown" else "any"
            self.metrics.requests.labels(method, route, status).observe(time.perf_counter() - began)
