"""What the service counts, for Prometheus. One registry an application: two can share a process."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
            "hypersam_segment_stage_seconds", "Duration of the stages of POST /segment", ("stage",),
            buckets=_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.embeddings = Counter(
            "hypersam_embedding_lookups_total", "Embeddings found in the cache or not", ("result",),
            registry=self.registry,
        )  # fmt: skip
        self.uploaded = Counter("hypersam_uploaded_bytes_total", "Bytes of checkpoints taken in",
                                registry=self.registry)  # fmt: skip
        self.waiting = Gauge("hypersam_jobs_waiting", "Jobs that wait for a worker", registry=self.registry)
        self.workers = Gauge("hypersam_workers", "Workers that gave a sign of life", registry=self.registry)
        self.resident = Gauge("hypersam_resident_bytes", "Bytes of models in memory", registry=self.registry)
        self.cached = Gauge("hypersam_embedding_bytes", "Bytes of embeddings in memory", registry=self.registry)

    def segmented(self, timings: Mapping[str, float], *, cached: bool) -> None:
        """Count one segmentation; ``timings`` are milliseconds."""
        self.embeddings.labels("hit" if cached else "miss").inc()
        for stage, milliseconds in timings.items():
            self.stages.labels(stage).observe(milliseconds / 1000)

    def text(self, stats: Mapping[str, Any], waiting: int | None, workers: int | None) -> bytes:
        """Return everything in Prometheus's text format. What could not be asked is NaN."""
        self.resident.set(stats.get("resident_bytes", 0))
        self.cached.set(stats.get("embedding_bytes", 0))
        self.waiting.set(float("nan") if waiting is None else waiting)
        self.workers.set(float("nan") if workers is None else workers)
        return generate_latest(self.registry)


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
