"""The service under load: requests a second and latency by number of clients, its own share, memory, batching.

The clients are coroutines of this process, each with one request under way at a time. Latency is the clients'.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.record import append
from benchmarks.serving import MODEL, Served, picture, service
from hypersam.images import decode_image
from hypersam.loading import load

CLIENTS = (1, 8, 64)
CLICK = {"points": [[128, 128]], "point_labels": [1]}
_WATCH = """
import http.client, json, select, sys, time
from urllib.parse import urlsplit
connection = http.client.HTTPConnection(urlsplit(sys.argv[1]).netloc, timeout=60)
times = []
while not times or not select.select([sys.stdin], [], [], 0.02)[0]:
    began = time.perf_counter()
    connection.request("GET", "/healthz")
    connection.getresponse().read()
    times.append(1000 * (time.perf_counter() - began))
print(json.dumps(times))
"""

Ask = Callable[[httpx.AsyncClient], Awaitable[dict[str, Any]]]


def run(checkpoint: Path, seconds: float, new_pictures: int, memory_requests: int) -> Iterator[dict[str, Any]]:
    """Rows of figures; each is appended to ``results/load.csv``.

    ``seconds``: how long cached embeddings are asked for at each number of clients; ``new_pictures``: how many are
    sent at each; ``memory_requests``: how many go by between two looks at the memory.
    """
    name = checkpoint.stem
    with service(checkpoint, max_batch="8") as served:
        bare = _bare(served)
        rows = asyncio.run(_measure(served, seconds, new_pictures, bare))
        for row in rows:
            yield _kept({"model": name, **row})
        batched = next(r for r in rows if r["kind"] == "new" and r["clients"] == 8)
        yield _kept({"model": name, **asyncio.run(_memory(served, memory_requests))})
    with service(checkpoint, max_batch="1") as served:
        alone = asyncio.run(_new(served, 8, new_pictures))
        yield _kept({
            "model": name, "kind": "new, batches of one", **alone,
            "batching_gain": batched["requests_per_s"] / alone["requests_per_s"],
        })  # fmt: skip


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    columns = (
        "model", "kind", "clients", "requests", "requests_per_s", "p50_ms", "p99_ms", "service_p50_ms", "bare_p50_ms",
        "share", "health_p99_ms", "batching_gain", "rss_before_mb", "rss_after_mb",
    )  # fmt: skip
    append("load", {column: row.get(column, "") for column in columns})
    return row


def _bare(served: Served) -> dict[str, float]:
    """Milliseconds of the library's own call in this process while the service rests: a click, and a new picture."""
    predictor = load(served.artifact())
    found: dict[str, list[float]] = {"cached": [], "new": []}
    for number in range(20):
        image = decode_image(picture(number))
        began = time.perf_counter()
        predictor.set_image(image)
        middle = time.perf_counter()
        predictor.predict(np.array(CLICK["points"]), np.array(CLICK["point_labels"]), multimask_output=False)
        ended = time.perf_counter()
        found["new"].append(1000 * (ended - began))
        found["cached"].append(1000 * (ended - middle))
    return {kind: statistics.median(times[3:]) for kind, times in found.items()}


async def _measure(served: Served, seconds: float, new_pictures: int, bare: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for clients in CLIENTS:
        row = await _cached(served, clients, until=time.perf_counter() + seconds)
        rows.append({"kind": "cached", **row, "bare_p50_ms": bare["cached"]})
    for clients in CLIENTS:
        rows.append({"kind": "new", **await _new(served, clients, new_pictures), "bare_p50_ms": bare["new"]})
    for row in rows:
        if row["clients"] == 1:
            row["share"] = 1 - row["bare_p50_ms"] / row["p50_ms"]
    return rows


async def _cached(
    served: Served, clients: int, *, until: float | None = None, total: int | None = None
) -> dict[str, Any]:
    """Clicks on one picture whose embedding is held, for so long or so often."""
    async with httpx.AsyncClient(base_url=served.url, timeout=300) as client:
        made = await client.post("/embed", files={"image": picture(1)}, data={"model": MODEL})
        image_id = made.raise_for_status().json()["image_id"]
    asked = 0

    def more() -> bool:
        nonlocal asked
        asked += 1
        return asked <= total if total is not None else time.perf_counter() < (until or 0)

    async def ask(client: httpx.AsyncClient) -> dict[str, Any]:
        return await _segment(client, json={"model": MODEL, "image_id": image_id, **CLICK})

    return await _load(served, clients, ask, more)


async def _new(served: Served, clients: int, count: int) -> dict[str, Any]:
    """Pictures that were never sent before, each with a click."""
    first = time.time_ns() % 1_000_000_000
    left = [picture(first + number) for number in range(count)]

    async def ask(client: httpx.AsyncClient) -> dict[str, Any]:
        return await _segment(
            client, files={"image": left.pop()}, data={"model": MODEL, "points": "[[128, 128]]", "labels": "[1]"}
        )

    return await _load(served, clients, ask, lambda: bool(left))


async def _segment(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer: dict[str, Any] = (await client.post("/segment", **body)).raise_for_status().json()
    return answer


async def _load(served: Served, clients: int, ask: Ask, more: Callable[[], bool]) -> dict[str, Any]:
    latencies: list[float] = []
    own: list[float] = []

    async def one(client: httpx.AsyncClient) -> None:
        while more():
            began = time.perf_counter()
            timings = (await ask(client))["timings"]
            latencies.append(1000 * (time.perf_counter() - began))
            own.append(timings["service"])

    # In a process of its own: this one is busy being the clients.
    watching = subprocess.Popen(
        [sys.executable, "-c", _WATCH, served.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=served.url, timeout=300, limits=limits) as client:
        began = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(clients)))
        took = time.perf_counter() - began
    health: list[float] = json.loads(watching.communicate()[0])
    return {
        "clients": clients, "requests": len(latencies), "requests_per_s": len(latencies) / took,
        "p50_ms": statistics.median(latencies), "p99_ms": float(np.percentile(latencies, 99)),
        "service_p50_ms": statistics.median(own), "health_p99_ms": float(np.percentile(health, 99)),
    }  # fmt: skip


async def _memory(served: Served, requests: int) -> dict[str, Any]:
    """Resident memory of the service's process before and after many requests; a tenth of them goes before that."""
    await _cached(served, 8, total=max(1, requests // 10))
    process = psutil.Process(served.pid)
    before = process.memory_info().rss
    row = await _cached(served, 8, total=requests)
    return {"kind": "memory", **row, "rss_before_mb": before / 1e6, "rss_after_mb": process.memory_info().rss / 1e6}
