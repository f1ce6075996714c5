"""Clients of a service on loopback that cost little themselves: prepared requests over connections that stay open.

Each client is a coroutine with one request under way. Answers are kept as bytes and read when the load is over, so
that a request costs this process about a tenth of a millisecond; ``Driven.client_cpu_ms`` says how much it was.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np


@dataclass
class Driven:
    """What a load came to. Times are milliseconds as the clients see them; loads of one kind add up."""

    latencies: list[float] = field(default_factory=list)
    answers: list[bytes] = field(default_factory=list)
    seconds: float = 0.0
    client_cpu_ms: float = 0.0
    """Processor time of this process for all requests."""

    def add(self, other: Driven) -> None:
        """Count another load of the same kind."""
        self.latencies += other.latencies
        self.answers += other.answers
        self.seconds += other.seconds
        self.client_cpu_ms += other.client_cpu_ms

    def row(self) -> dict[str, Any]:
        """Requests, their rate, and how long they took."""
        count = len(self.latencies)
        return {
            "requests": count, "requests_per_s": count / self.seconds,
            "p50_ms": statistics.median(self.latencies), "p99_ms": float(np.percentile(self.latencies, 99)),
            "client_cpu_ms": self.client_cpu_ms / count,
        }  # fmt: skip

    def timings(self, *stages: str) -> float:
        """Median of the sum of these stages in the answers' ``timings``."""
        found = [json.loads(answer)["timings"] for answer in self.answers]
        return statistics.median(sum(each.get(stage, 0.0) for stage in stages) for each in found)


def post(path: str, body: dict[str, Any] | httpx.Request) -> bytes:
    """A POST of JSON, or of a request that httpx has built, as it goes over the wire."""
    if isinstance(body, httpx.Request):
        kind, data = body.headers["Content-Type"], body.read()
    else:
        kind, data = "application/json", json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: loopback\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def drive(url: str, clients: int, ask: Callable[[int], bytes | None]) -> Driven:
    """Keep so many clients busy until ``ask``, called with a client's number, has no request for any of them.

    Raises SystemExit with the answer where one is not 200.
    """
    return asyncio.run(_drive(url, clients, ask))


async def _drive(url: str, clients: int, ask: Callable[[int], bytes | None]) -> Driven:
    address = urlsplit(url)
    driven = Driven()

    async def one(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (request := ask(number)) is not None:
            began = time.perf_counter()
            writer.write(request)
            answer = await _answer(reader)
            driven.latencies.append(1000 * (time.perf_counter() - began))
            driven.answers.append(answer)
        writer.close()

    opened = [await asyncio.open_connection(address.hostname, address.port) for _ in range(clients)]
    began, cpu = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for number, (reader, writer) in enumerate(opened):
            group.create_task(one(number, reader, writer))
    driven.seconds = time.perf_counter() - began
    driven.client_cpu_ms = 1000 * (time.process_time() - cpu)
    return driven


async def _answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        int(line.partition(b":")[2]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")
    )
    body = await reader.readexactly(length)
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise SystemExit((head + body).decode(errors="replace"))
    return body
