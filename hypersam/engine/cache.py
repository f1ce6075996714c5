"""Embeddings that were made and may be asked for again."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping

from hypersam.sam.model import Embedding

Key = tuple[str, str]
"""A model's digest and a picture's id."""


class EmbeddingCache:
    """At most ``limit`` bytes of embeddings, each for ``ttl`` seconds after it was last asked for.

    The least recently used leave first. May be called from any thread. ``now`` is the clock, in seconds.
    """

    def __init__(self, limit: int, ttl: float, now: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._ttl, self._now = limit, ttl, now
        self._held: OrderedDict[Key, tuple[Embedding, float]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Key) -> Embedding | None:
        """The embedding, which counts as used now."""
        with self._lock:
            self._expire()
            if key not in self._held:
                return None
            embedding, _ = self._held.pop(key)
            self._held[key] = (embedding, self._now() + self._ttl)
            return embedding

    def put(self, key: Key, embedding: Embedding) -> None:
        """Keep an embedding, unless it alone is larger than the limit."""
        with self._lock:
            self._expire()
            self._drop(key)
            if embedding.nbytes > self._limit:
                return
            self._held[key] = (embedding, self._now() + self._ttl)
            self._bytes += embedding.nbytes
            while self._bytes > self._limit:
                self._drop(next(iter(self._held)))

    def forget(self, digest: str | None = None) -> None:
        """Let go of a model's embeddings, or of all."""
        with self._lock:
            for key in [k for k in self._held if digest is None or k[0] == digest]:
                self._drop(key)

    def by_model(self) -> Mapping[str, tuple[int, int]]:
        """Number and bytes of the embeddings held, by model digest."""
        with self._lock:
            self._expire()
            found: dict[str, tuple[int, int]] = {}
            for (digest, _), (embedding, _) in self._held.items():
                count, size = found.get(digest, (0, 0))
                found[digest] = (count + 1, size + embedding.nbytes)
            return found

    def _drop(self, key: Key) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self._bytes -= held[0].nbytes

    def _expire(self) -> None:
        # The order of use is the order of expiry, so what is due stands in front.
        now = self._now()
        while self._held and next(iter(self._held.values()))[1] <= now:
            self._drop(next(iter(self._held)))
