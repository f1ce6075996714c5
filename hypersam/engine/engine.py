"""The engine: pictures and prompts in, masks out, for as many callers as may wait."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from hypersam.cores import use_cores
from hypersam.engine.cache import EmbeddingCache, Key
from hypersam.engine.decoding import Decoded, full_masks, in_parts, on_cpu
from hypersam.engine.device import MOST_PICTURES, Decode, DeviceThread, Encode
from hypersam.engine.everything import Candidates, Everything, Found, Grid, click, promising, sift, suppress
from hypersam.engine.flights import Flight, Flights
from hypersam.engine.memory import out_of_memory, release
from hypersam.engine.prompts import Mask, ModelFile, Prompt, Segmentation, check_prompts, check_suits, image_id_of
from hypersam.engine.residency import ModelPool, Resident
from hypersam.errors import Overloaded, PromptError, Unavailable, UnknownImage
from hypersam.loading import resolve_device
from hypersam.sam.model import Embedding, SamModel
from hypersam.settings import Settings

Picture = NDArray[np.uint8] | Callable[[], NDArray[np.uint8]]
"""RGB pixels (uint8, H x W x 3), or what gives them: it runs on a thread of the engine's, few at a time."""

log = logging.getLogger(__name__)

P = ParamSpec("P")
L = TypeVar("L")
T = TypeVar("T")

PICTURES_AT_ONCE = 2  # taken apart or put together: each may take hundreds of MB, and a core
MASK_BYTES = 1 << 30
"""Bytes of full-size masks, one a pixel, that one request may ask for."""
_GRID_CHUNK = 64
"""Points of a grid decoded between two looks at what else waits."""


@dataclass(frozen=True)
class _Embedded:
    """A picture whose embedding is at hand."""

    resident: Resident
    embedding: Embedding
    image_id: str
    lookup: str


class Engine:
    """Serves prompts against compressed models.

    ``settings`` gives the device, the encoder's dtype and batch, the bytes of models that may be resident, the bytes
    and age of embeddings kept, and how many requests may wait. The coroutines may run on any event loop. One that
    is cancelled takes what it waits for out of the queues.
    """

    def __init__(self, settings: Settings) -> None:
        self._device_name = resolve_device(settings.device)
        dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
        self._cache = EmbeddingCache(settings.embedding_cache_bytes, settings.embedding_ttl)
        self._models = ModelPool(
            self._device_name, dtype, settings.resident_bytes, self._cache.forget, settings.resident
        )
        batch = settings.max_batch or (None if self._device_name.type == "cpu" else MOST_PICTURES)
        self._device = DeviceThread(self._models, self._cache, batch)
        self._embeddings: Flights[Key, Embedding] = Flights()
        self._before = ThreadPoolExecutor(PICTURES_AT_ONCE, "hypersam-before", use_cores, (1,))
        self._after = ThreadPoolExecutor(PICTURES_AT_ONCE, "hypersam-after", use_cores, (1,))
        self._max_waiting = settings.max_waiting
        self._inside = 0
        self._pace = 0.1  # seconds from one answer to the next under load, a moving average
        self._answered_at = 0.0
        self._rejected = self._abandoned = 0
        self._shortages = 0  # on this engine's own threads
        self._lookups: Counter[tuple[str, str]] = Counter()
        self._names: dict[str, str] = {}  # of every model that was asked for, by digest
        self._closing = False
        self._lock = threading.Lock()

    async def segment(
        self,
        file: ModelFile,
        picture: Picture | None,
        prompts: Sequence[Prompt],
        *,
        multimask: bool,
        image_id: str | None = None,
        admitted: bool = False,
    ) -> Segmentation:
        """Masks for prompts on a picture, or on one seen before by its ``image_id``.

        ``admitted``: the caller holds a place for it, see ``admit``. Raises PromptError, UnknownImage, ImageError,
        Overloaded, Unavailable, or ArtifactError where the model cannot be loaded.
        """
        with contextlib.nullcontext() if admitted else self.admit():
            clock = _Clock()
            embedded = await self._embed(
                file, picture, image_id, clock, lambda size: check_prompts(prompts, *size),
                lambda model: check_suits(prompts, model),
            )  # fmt: skip
            height, width = embedded.embedding.original_size
            size = len(prompts) * (3 if multimask else 1) * width * height
            if size > MASK_BYTES:
                raise PromptError(
                    f"{len(prompts)} prompts on a picture of {width} x {height} pixels give {size >> 20} MiB of masks; "
                    f"at most {MASK_BYTES >> 20} are given at once, so send fewer prompts at a time",
                    field="prompts",
                )
            decoded = await self._decode(embedded, prompts, multimask, clock)
            masks: list[Mask] = []
            for first, part in in_parts(decoded, width * height):
                make = partial(full_masks, first=first)
                masks += await self._on(self._after, self._made, make, embedded, part, on_cpu)
            clock.lap("masks")
            return Segmentation(embedded.image_id, width, height, tuple(masks), clock.laps, embedded.lookup)

    async def everything(
        self, file: ModelFile, picture: Picture | None, grid: Grid, *, image_id: str | None = None
    ) -> Everything:
        """Masks of all that a grid of points finds, the best first. Raises as ``segment`` does."""
        with self.admit():
            clock = _Clock()
            embedded = await self._embed(file, picture, image_id, clock)
            height, width = embedded.embedding.original_size
            points = grid.points(width, height)
            found: list[Found] = []
            for start in range(0, len(points), _GRID_CHUNK):
                some = points[start : start + _GRID_CHUNK]
                decoded = await self._decode(embedded, [click(p) for p in some], True, clock)
                candidates = await self._on(
                    self._after, self._made, lambda _, __, given: promising(given, grid), embedded, decoded, on_cpu
                )
                sifted = partial(sift, points=some, grid=grid)
                for part in candidates.parts(width * height):
                    found += await self._on(self._after, self._made, sifted, embedded, part, Candidates.cpu)
                clock.lap("masks")
            kept = await self._on(self._after, suppress, found, grid)
            clock.lap("masks")
            return Everything(embedded.image_id, width, height, tuple(kept), clock.laps, embedded.lookup)

    async def embed(self, file: ModelFile, picture: Picture) -> Segmentation:
        """Make a picture's embedding ahead of its prompts: an answer without masks."""
        with self.admit():
            clock = _Clock()
            embedded = await self._embed(file, picture, None, clock)
            height, width = embedded.embedding.original_size
            return Segmentation(embedded.image_id, width, height, (), clock.laps, embedded.lookup)

    def segment_sync(
        self,
        file: ModelFile,
        picture: Picture | None,
        prompts: Sequence[Prompt],
        *,
        multimask: bool,
        image_id: str | None = None,
    ) -> Segmentation:
        """``segment`` for a thread without an event loop."""
        return asyncio.run(self.segment(file, picture, prompts, multimask=multimask, image_id=image_id))

    def check_room(self) -> None:
        """Raise Overloaded if a request that came now would be refused: before its body is read."""
        with self._lock:
            self._refuse_if_full()

    def forget(self, digest: str) -> None:
        """Drop a model and its embeddings; requests that use it now still end."""
        self._models.forget(digest)
        self._cache.forget(digest)

    def forget_name(self, name: str) -> None:
        """Drop what was counted of a name that no model has any more."""
        for key in [key for key in self._lookups if key[0] == name]:
            del self._lookups[key]
        for digest in [digest for digest, held in self._names.items() if held == name]:
            del self._names[digest]
        self._device.forget_name(name)

    def stats(self) -> dict[str, Any]:
        """Counts and bytes as of now; under ``models`` by a model's name, under ``lookups`` by its name and what came
        of the look for an embedding, under ``batches`` and ``decodes`` by its name and the size of the encoder's and
        the decoder's calls, under ``queues`` by stage and its name."""
        residents, embeddings = self._models.residents(), self._cache.by_model()
        queues, names = self._device.queued(), set(self._names.values())
        models = {r.file.id: {"resident_bytes": r.bytes, "embeddings": 0, "embedding_bytes": 0} for r in residents}
        for digest, (count, size) in embeddings.items():
            # A request that ends after its model was deleted may leave an embedding for a while.
            model = models.setdefault(self._names.get(digest, digest), {"resident_bytes": 0})
            model["embeddings"], model["embedding_bytes"] = count, size
        return {
            "device": str(self._device_name),
            "models": models,
            "resident_models": len(residents),
            "resident_bytes": sum(r.bytes for r in residents),
            "model_loads": self._models.loads,
            "embeddings": sum(count for count, _ in embeddings.values()),
            "embedding_bytes": sum(size for _, size in embeddings.values()),
            "lookups": dict(self._lookups),
            "batches": dict(self._device.batches),
            "decodes": dict(self._device.decodes),
            "queued": {stage: tasks.total() for stage, tasks in queues.items()},
            "queues": {(stage, name): tasks[name] for stage, tasks in queues.items() for name in names},
            "waiting": self._inside,
            "rejected": self._rejected,
            "abandoned": self._abandoned,
            "memory_shortages": self._device.shortages + self._shortages,
        }

    def state(self) -> str:
        """``ok``, ``closing`` where it takes no more requests, or ``dead`` where its device's thread has ended."""
        return "closing" if self._closing else "ok" if self._device.alive() else "dead"

    def close(self) -> None:
        """Refuse what comes, finish what runs on the device, let the models go."""
        self._closing = True
        self._before.shutdown(wait=True, cancel_futures=True)
        self._device.close()
        self._after.shutdown(wait=True, cancel_futures=True)
        self._models.close()
        self._cache.forget()

    @contextmanager
    def admit(self, pictures: int = 1) -> Iterator[None]:
        """Hold places among the requests that wait, all or none. Raises Overloaded and Unavailable.

        One request may bring more pictures than there are places; then it has to be the only one.
        """
        with self._lock:
            self._refuse_if_full(pictures)
            if not self._inside:
                self._answered_at = time.monotonic()  # what was before is no pace
            self._inside += pictures
        try:
            yield
        except asyncio.CancelledError:
            self._abandoned += 1
            raise
        finally:
            with self._lock:
                now = time.monotonic()
                if self._inside > pictures:  # others wait, so that this is how long one takes
                    self._pace += 0.1 * ((now - self._answered_at) / pictures - self._pace)
                self._answered_at = now
                self._inside -= pictures

    def _refuse_if_full(self, pictures: int = 1) -> None:
        if self._closing:
            raise Unavailable("the service is shutting down")
        if self._inside and self._inside + pictures > self._max_waiting:
            self._rejected += 1
            wait = min(60, max(1, math.ceil(self._pace * self._inside / 2)))
            raise Overloaded(f"{self._inside} requests are waiting already; try again in {wait} s", retry_after=wait)

    async def _embed(
        self,
        file: ModelFile,
        picture: Picture | None,
        image_id: str | None,
        clock: _Clock,
        check: Callable[[tuple[int, int]], None] = lambda size: None,
        suits: Callable[[SamModel], None] = lambda model: None,
    ) -> _Embedded:
        """The model and the picture's embedding. ``check`` is called with (width, height), ``suits`` with the model, as
        soon as they are known: nothing is encoded for what cannot be answered."""
        image: NDArray[np.uint8] | None = None
        if picture is not None:
            pixels, image_id = await self._on(self._before, _identified, picture)
            image = pixels
            check((pixels.shape[1], pixels.shape[0]))
        if image_id is None:
            raise PromptError("a picture or an image_id is needed", field="image")
        clock.lap("image")
        resident = await self._models.get(file)
        suits(resident.model)
        clock.lap("load")
        self._names[file.digest] = file.id
        key = (file.digest, image_id)
        embedding, lookup = self._cache.get(key), "hit"
        if embedding is None:
            if image is None and not self._embeddings.under_way(key):
                raise UnknownImage(f"no embedding of image {image_id} is held for model {file.id}; send the picture")
            embedding, lookup = await self._encode(resident, key, image, clock)
        clock.laps.setdefault("encode", 0.0)
        self._lookups[file.id, lookup] += 1
        if image is None:
            height, width = embedding.original_size
            check((width, height))
        return _Embedded(resident, embedding, image_id, lookup)

    async def _encode(
        self, resident: Resident, key: Key, image: NDArray[np.uint8] | None, clock: _Clock
    ) -> tuple[Embedding, str]:
        flight, embedding, joined = await self._embeddings.join(
            key, lambda flight: self._before.submit(self._resize, resident, key, image, flight)
        )
        clock.lap("queue", flight.spent)
        return embedding, "joined" if joined else "miss"

    def _resize(self, resident: Resident, key: Key, image: NDArray[np.uint8] | None, flight: Flight[Embedding]) -> None:
        """A flight's first stage; the device thread does the rest."""
        try:
            # Another flight may have landed between this one's look at the cache and its start.
            if (held := self._cache.get(key)) is not None:
                flight.future.set_result(held)
            elif image is None:
                raise UnknownImage(f"the embedding of image {key[1]} was not made after all; send the picture")
            elif flight.claim():
                began = time.perf_counter()
                pixels = resident.model.resized(image)
                flight.spent["resize"] = time.perf_counter() - began
                self._device.encode(Encode(resident, key, pixels, (image.shape[0], image.shape[1]), flight))
        except BaseException as error:
            flight.future.set_exception(error)

    async def _decode(
        self, embedded: _Embedded, prompts: Sequence[Prompt], multimask: bool, clock: _Clock
    ) -> list[Decoded]:
        task = Decode(embedded.resident, embedded.embedding, tuple(prompts), multimask)
        decoded, took = await asyncio.wrap_future(self._device.decode(task))
        clock.lap("queue", {"decode": took})
        return decoded

    def _made(
        self,
        make: Callable[[SamModel, Embedding, L], T],
        embedded: _Embedded,
        low_res: L,
        moved: Callable[[L], L],
    ) -> T:
        """What ``make`` makes of low-resolution masks; on the CPU, where ``moved`` takes them, if the device has no
        memory for it."""
        model, embedding = embedded.resident.model, embedded.embedding
        try:
            return make(model, embedding, low_res)
        except Exception as error:
            if not out_of_memory(error):
                raise
            log.warning("the device has no memory left for full-size masks: %s", error)
        with self._lock:
            self._shortages += 1
        release()  # out of the handler, whose traceback holds the tensors
        try:
            return make(model, embedding, moved(low_res))
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise Unavailable("there is not enough memory for this picture's masks; send fewer prompts") from error

    async def _on(self, pool: ThreadPoolExecutor, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        future: Future[T] = pool.submit(call, *args, **kwargs)
        return await asyncio.wrap_future(future)


class _Clock:
    """Milliseconds by stage. A stage that comes again adds to what it took before."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str, within: dict[str, float] | None = None) -> None:
        """The time since the last lap; ``within``: seconds of it that belong to other stages."""
        now = time.perf_counter()
        parts = {stage: 1000 * seconds for stage, seconds in (within or {}).items()}
        parts[name] = max(0.0, 1000 * (now - self._last) - sum(parts.values()))
        for stage, value in parts.items():
            self.laps[stage] = round(self.laps.get(stage, 0.0) + value, 3)
        self._last = now


def _identified(picture: Picture) -> tuple[NDArray[np.uint8], str]:
    image = picture() if callable(picture) else picture
    return image, image_id_of(image)
