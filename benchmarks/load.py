"""The service under load: requests a second and latency by number of clients, its own share, memory, batching.

Latency is the clients', who are coroutines of this process (``clients``) on the same cores; ``client_cpu_ms`` says what
a request costs them, ``server_cpu_ms`` what it costs all threads of the service. The bare model call is the library's
own (``bare``), in a process that runs in turn with the load, a few seconds each, so that both find the same machine:

- ``bare_ms``: median of one call for the same work, nothing batched, with all threads that torch takes
- ``added_ms``, with one client: ``p50_ms`` less ``bare_ms``. All that a request costs beside the model: the client,
  HTTP, JSON, threads' turns, the mask's encoding
- ``share``: 1 - ``requests_per_s`` x ``bare_ms`` / 1000, the part of the time in which a machine that made bare calls
  one after another would have been done. Below zero the service is faster than that, as it batches clicks on a picture
  and decodes some while it encodes others' masks
- ``model_p50_ms``: decoding and full-size masks, and encoding for new pictures, inside the service, by its ``timings``
- ``service_p50_ms``: by its ``timings`` too, all of a request in its route but what the engine took

Kinds: ``cached``, each client clicks on a picture of its own whose embedding is held; ``cached, one picture``, all on
the same one, so that the service may decode their clicks together; ``new``, pictures never sent before;
``memory``; and ``new, batches of one`` beside ``new, batches of 8``, in turn, for what batching gains.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.clients import Driven, drive, post
from benchmarks.record import append
from benchmarks.serving import MODEL, Served, picture, service

CLIENTS = (1, 8, 64)
ROUNDS = 5
CLICK = {"points": [[128, 128]], "point_labels": [1]}
BATCH = 8
COLUMNS = (
    "model", "kind", "clients", "requests", "requests_per_s", "p50_ms", "p99_ms", "bare_ms", "added_ms", "share",
    "model_p50_ms", "service_p50_ms", "client_cpu_ms", "server_cpu_ms", "health_p99_ms", "batching_gain",
    "rss_before_mb", "rss_after_mb",
)  # fmt: skip
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

Bare = Callable[[str, float], list[float]]
"""A kind of call and for how many seconds, to the milliseconds of each."""
Load = Callable[[], Driven]


def run(checkpoint: Path, seconds: float, new_pictures: int, memory_requests: int) -> Iterator[dict[str, Any]]:
    """Rows of figures; each is appended to ``results/load.csv``.

    ``seconds``: how long cached embeddings are asked for at each number of clients; ``new_pictures``: how many are
    sent at each; ``memory_requests``: how many go by between two looks at the memory.
    """
    for row in _rows(checkpoint, seconds, new_pictures, memory_requests):
        kept = {column: row.get(column, "") for column in COLUMNS} | {"model": checkpoint.stem}
        append("load", kept)
        yield {column: value for column, value in kept.items() if value != ""}


def _rows(checkpoint: Path, seconds: float, new_pictures: int, memory_requests: int) -> Iterator[dict[str, Any]]:
    with service(checkpoint) as served, _bare(served) as bare:
        for kind, pictures in (("cached", max(CLIENTS)), ("cached, one picture", 1)):
            requests = _clicks(served, pictures)
            for clients in CLIENTS:
                if (kind, clients) != ("cached, one picture", 1):  # the same as cached
                    yield _row(kind, served, clients, bare, seconds / ROUNDS, lambda c=clients, r=requests: _for(  # type: ignore[misc]
                        served, c, r, seconds / ROUNDS))  # fmt: skip
        part = -(-new_pictures // ROUNDS)
        for clients in CLIENTS:
            yield _row("new", served, clients, bare, seconds / ROUNDS, lambda c=clients: _new(served, c, part))  # type: ignore[misc]
        yield _memory(served, memory_requests)
    with service(checkpoint, max_batch="1") as single, service(checkpoint, max_batch=str(BATCH)) as batched:
        yield from _batching(single, batched, -(-new_pictures // ROUNDS))


def _row(kind: str, served: Served, clients: int, bare: Bare, seconds: float, load: Load) -> dict[str, Any]:
    """Load and bare calls in turn."""
    process, driven = psutil.Process(served.pid), Driven()
    alone: list[float] = []
    health: list[float] = []
    cpu = 0.0
    for _ in range(ROUNDS):
        alone += bare("new" if kind == "new" else "cached", seconds / 2)
        before = _cpu_ms(process)
        with _watched(served, health):
            driven.add(load())
        cpu += _cpu_ms(process) - before
    bare_ms = statistics.median(alone)
    row = {"kind": kind, "clients": clients, **driven.row(), "bare_ms": bare_ms}
    row["share"] = 1 - row["requests_per_s"] * bare_ms / 1000
    if clients == 1:
        row["added_ms"] = row["p50_ms"] - bare_ms
    return row | {
        "model_p50_ms": driven.timings("resize", "encode", "decode", "masks"),
        "service_p50_ms": driven.timings("service"),
        "server_cpu_ms": cpu / row["requests"],
        "health_p99_ms": float(np.percentile(health, 99)),
    }


def _cpu_ms(process: psutil.Process) -> float:
    times = process.cpu_times()
    return 1000 * float(times.user + times.system)


@contextlib.contextmanager
def _bare(served: Served) -> Iterator[Bare]:
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        file.write(picture(1))
        file.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bare", str(served.artifact()), file.name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        asked, told = process.stdin, process.stdout
        told.readline()

        def call(kind: str, seconds: float) -> list[float]:
            asked.write(f"{kind} {seconds}\n")
            asked.flush()
            times: list[float] = json.loads(told.readline())
            return times

        with process:
            yield call
            asked.close()


@contextlib.contextmanager
def _watched(served: Served, health: list[float]) -> Iterator[None]:
    """Ask ``/healthz`` fifty times a second meanwhile, in a process of its own: this one is busy being the clients."""
    watching = subprocess.Popen(
        [sys.executable, "-c", _WATCH, served.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield
    health += json.loads(watching.communicate()[0])


def _clicks(served: Served, pictures: int) -> list[bytes]:
    """Requests on pictures whose embeddings are held from now on."""
    ids = []
    with httpx.Client(base_url=served.url, timeout=300) as client:
        for number in range(pictures):
            made = client.post("/embed", files={"image": picture(number)}, data={"model": MODEL})
            ids.append(made.raise_for_status().json()["image_id"])
    return [post("/segment", {"model": MODEL, "image_id": image_id, **CLICK}) for image_id in ids]


def _for(served: Served, clients: int, requests: list[bytes], seconds: float) -> Driven:
    until = time.perf_counter() + seconds
    return drive(served.url, clients, lambda n: requests[n % len(requests)] if time.perf_counter() < until else None)


def _new(served: Served, clients: int, count: int) -> Driven:
    """Pictures that were never sent before, each with a click."""
    first = time.time_ns() % 1_000_000_000
    fields = {"model": MODEL, "points": "[[128, 128]]", "labels": "[1]"}
    made = (httpx.Request("POST", served.url, files={"image": picture(first + n)}, data=fields) for n in range(count))
    left = [post("/segment", request) for request in made]
    return drive(served.url, clients, lambda _: left.pop() if left else None)


def _memory(served: Served, requests: int) -> dict[str, Any]:
    """Resident memory of the service's process before and after many requests; a tenth of them goes before that."""
    clicks = _clicks(served, 8)
    process = psutil.Process(served.pid)

    def ask(count: int) -> Driven:
        numbers = itertools.count()
        return drive(served.url, 8, lambda n: clicks[n] if next(numbers) < count else None)

    ask(max(1, requests // 10))
    before, health = process.memory_info().rss, list[float]()
    with _watched(served, health):
        driven = ask(requests)
    return {
        "kind": "memory", "clients": 8, **driven.row(), "health_p99_ms": float(np.percentile(health, 99)),
        "rss_before_mb": before / 1e6, "rss_after_mb": process.memory_info().rss / 1e6,
    }  # fmt: skip


def _batching(single: Served, batched: Served, pictures: int) -> Iterator[dict[str, Any]]:
    """New pictures of eight clients, with batches of one and of eight, in turn."""
    alone, together = Driven(), Driven()
    for _ in range(ROUNDS):
        alone.add(_new(single, BATCH, pictures))
        together.add(_new(batched, BATCH, pictures))
    gain = together.row()["requests_per_s"] / alone.row()["requests_per_s"]
    yield {"kind": "new, batches of one", "clients": BATCH, **alone.row()}
    yield {"kind": f"new, batches of {BATCH}", "clients": BATCH, **together.row(), "batching_gain": gain}
