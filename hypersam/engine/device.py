"""The one thread that runs networks: micro-batches for the encoder, one call for all prompts on a picture."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from hypersam.cores import use_cores
from hypersam.engine.cache import EmbeddingCache, Key
from hypersam.engine.decoding import AT_ONCE, Decoded, decode
from hypersam.engine.flights import Flight
from hypersam.engine.memory import out_of_memory, release
from hypersam.engine.prompts import Prompt
from hypersam.engine.residency import ModelPool, Resident
from hypersam.errors import HypersamError, Unavailable
from hypersam.sam.model import Embedding

log = logging.getLogger(__name__)

Result = TypeVar("Result")

MOST_PICTURES = 8
"""Of a batch, where nobody says otherwise."""

_PIXELS = 1 << 20
"""Of a batch on a CPU, where nobody says otherwise: small pictures gain by company, one of SAM's fills the caches."""

_FEW = 1 << 18
"""Numbers of an embedding, times the prompts, under which one core decodes faster than several that wake one another;
SAM's has four times as many."""


@dataclass(frozen=True, eq=False)
class Encode:
    """A picture (1, 3, h, w), resized by the model's rules, on its way to the encoder. ``size``: (height, width) of
    the picture as sent; ``key``: where the cache takes the embedding."""

    resident: Resident
    key: Key
    pixels: Tensor
    size: tuple[int, int]
    flight: Flight[Embedding]


@dataclass(frozen=True, eq=False)
class Decode:
    """Prompts on their way to the decoder. The future gives what came of them and the seconds that it took."""

    resident: Resident
    embedding: Embedding
    prompts: tuple[Prompt, ...]
    multimask: bool
    future: Future[tuple[list[Decoded], float]] = field(default_factory=Future)


class DeviceThread:
    """Runs what is submitted until ``close``.

    A round is all prompts that wait, then one batch of pictures: a click waits for one batch at most, and pictures
    for one round of clicks. Whatever came in meanwhile joins the next round, so a batch grows with the load and a
    lone request never waits for company. Only this thread calls networks, so nothing of them needs a lock.
    """

    def __init__(self, models: ModelPool, cache: EmbeddingCache, max_batch: int | None) -> None:
        self._models, self._cache, self._max_batch = models, cache, max_batch
        self._cores = torch.get_num_threads()
        self._smaller: dict[str, int] = {}  # batches that a model was found to have memory for, by digest
        self._encodes: deque[Encode] = deque()
        self._decodes: deque[Decode] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self.batches: Counter[tuple[str, int]] = Counter()
        """Encoder calls by model and batch size."""
        self.decodes: Counter[tuple[str, int]] = Counter()
        """Decoder calls by model and number of prompts."""
        self.shortages = 0
        """Times that memory was exhausted."""
        self._thread = threading.Thread(target=self._run, name="hypersam-device", daemon=True)
        self._thread.start()

    def encode(self, task: Encode) -> None:
        """Queue a picture."""
        self._submit(self._encodes, task)

    def decode(self, task: Decode) -> Future[tuple[list[Decoded], float]]:
        """Queue prompts."""
        self._submit(self._decodes, task)
        return task.future

    def queued(self) -> dict[str, Counter[str]]:
        """How many tasks wait, by stage and by model."""
        with self._wake:
            return {
                "encode": Counter(task.resident.file.id for task in self._encodes),
                "decode": Counter(task.resident.file.id for task in self._decodes),
            }

    def forget_name(self, name: str) -> None:
        """Drop what was counted of a model's name."""
        for counts in (self.batches, self.decodes):
            for key in [key for key in list(counts) if key[0] == name]:
                counts.pop(key, None)

    def alive(self) -> bool:
        """Whether the thread still takes what is asked."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Finish the round that runs; what waits fails with Unavailable."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        waiting: list[Future[Any]] = [task.flight.future for task in self._encodes]
        waiting += [task.future for task in self._decodes]
        for future in waiting:
            if not future.done():
                future.set_exception(Unavailable("the service is shutting down"))

    def _submit(self, queue: deque[Encode] | deque[Decode], task: Encode | Decode) -> None:
        with self._wake:
            if self._closing:
                raise Unavailable("the service is shutting down")
            queue.append(task)  # type: ignore[arg-type]
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._encodes or self._decodes or self._closing):
                    self._wake.wait()
                if self._closing:
                    return
                decodes = list(self._decodes)
                self._decodes.clear()
            for group in _by_picture(decodes):
                self._decode_group(group)
            del decodes
            if batch := self._next_batch():
                self._encode_batch(batch)
            batch = []  # pictures must not be held while this thread waits

    def _next_batch(self) -> list[Encode]:
        """The picture that waited longest and others for its model."""
        with self._wake:
            taken: list[Encode] = []
            rest: deque[Encode] = deque()
            room = 1
            for task in self._encodes:
                if taken and (len(taken) == room or task.resident is not taken[0].resident):
                    rest.append(task)
                elif task.flight.claim():
                    taken.append(task)
                    room = self._smaller.get(task.key[0]) or self._max_batch or on_a_cpu(task.resident.model.image_size)
            self._encodes = rest
            return taken

    def _encode_batch(self, batch: Sequence[Encode]) -> None:
        began = time.perf_counter()
        try:
            embeddings = self._embed(batch)
        except BaseException as error:
            for task in batch:
                task.flight.future.set_exception(error)
            return
        took = time.perf_counter() - began
        for task, embedding in zip(batch, embeddings, strict=True):
            task.flight.spent["encode"] = took
            self._cache.put(task.key, embedding)  # before the waiters go, so that the next finds it
            task.flight.future.set_result(embedding)

    def _embed(self, batch: Sequence[Encode]) -> list[Embedding]:
        """Embeddings of a batch; of halves, then with all else evicted, then on the CPU where memory is short."""
        use_cores(self._cores)
        embeddings = self._attempt(lambda: self._call(batch[0].resident, batch))
        if embeddings is None and len(batch) > 1:
            middle = len(batch) // 2
            self._smaller[batch[0].key[0]] = middle
            return self._embed(batch[:middle]) + self._embed(batch[middle:])
        if embeddings is None:
            self._relieve(batch[0].resident)
            embeddings = self._attempt(lambda: self._call(batch[0].resident, batch))
        if embeddings is None:
            moved = self._models.move_to_cpu(batch[0].resident.file)
            embeddings = self._attempt(lambda: self._call(moved, batch))
        return embeddings or _give_up(batch[0].resident)

    def _call(self, resident: Resident, batch: Sequence[Encode]) -> list[Embedding]:
        embeddings = resident.model.embed_batch([(task.pixels, task.size) for task in batch])
        self.batches[resident.file.id, len(batch)] += 1
        return embeddings

    def _decode_group(self, group: Sequence[Decode]) -> None:
        """All prompts on one picture together; each task alone if that fails, for one may be to blame."""
        group = [task for task in group if task.future.set_running_or_notify_cancel()]
        if not group:
            return
        began = time.perf_counter()
        try:
            decoded = self._decode(group[0], [prompt for task in group for prompt in task.prompts])
        except HypersamError as error:
            if len(group) == 1:
                group[0].future.set_exception(error)
                return
            for task in group:
                self._decode_alone(task)
            return
        except BaseException as error:
            for task in group:
                task.future.set_exception(error)
            return
        took = time.perf_counter() - began
        at = 0
        for task in group:
            task.future.set_result((decoded[at : at + len(task.prompts)], took))
            at += len(task.prompts)

    def _decode_alone(self, task: Decode) -> None:
        began = time.perf_counter()
        try:
            decoded = self._decode(task, task.prompts)
        except BaseException as error:
            task.future.set_exception(error)
            return
        task.future.set_result((decoded, time.perf_counter() - began))

    def _decode(self, task: Decode, prompts: Sequence[Prompt]) -> list[Decoded]:
        """The same steps down as for pictures."""
        use_cores(1 if len(prompts) * task.embedding.features.numel() < _FEW else self._cores)
        resident = task.resident
        for at_once in (AT_ONCE, 1):
            decoded = self._attempt(lambda n=at_once: self._call_decoder(resident, task, prompts, n))  # type: ignore[misc]
            if decoded is not None:
                return decoded
            self._relieve(resident)
        moved = self._models.move_to_cpu(resident.file)
        return self._attempt(lambda: self._call_decoder(moved, task, prompts, 1)) or _give_up(resident)

    def _call_decoder(self, resident: Resident, task: Decode, prompts: Sequence[Prompt], at_once: int) -> list[Decoded]:
        """Decode where the model is: it, or the embedding, may have been moved to the CPU."""
        device, embedding, name = resident.model.device, task.embedding, resident.file.id

        def called(size: int) -> None:
            self.decodes[name, size] += 1

        if embedding.features.device != device:
            embedding = replace(embedding, parts=tuple(part.to(device) for part in embedding.parts))
        return decode(resident.model, embedding, prompts, multimask=task.multimask, at_once=at_once, called=called)

    def _attempt(self, call: Callable[[], list[Result]]) -> list[Result] | None:
        """What ``call`` gives, or None where memory ran out."""
        try:
            return call()
        except Exception as error:
            if not out_of_memory(error):
                raise
            self.shortages += 1
            log.warning("the device has no memory left: %s", error)
        release()  # out of the handler, whose traceback holds the tensors
        return None

    def _relieve(self, resident: Resident) -> None:
        self._models.evict_others(resident.file.digest)
        self._cache.forget()
        release()


def on_a_cpu(side: int) -> int:
    """Pictures of a batch on a CPU for a network whose input is ``side`` x ``side`` pixels."""
    return max(1, min(MOST_PICTURES, _PIXELS // side**2))


def _give_up(resident: Resident) -> NoReturn:
    raise Unavailable(f"there is not enough memory to run model {resident.file.id!r}")


def _by_picture(tasks: Sequence[Decode]) -> list[list[Decode]]:
    groups: dict[tuple[int, int, bool], list[Decode]] = {}
    for task in tasks:
        groups.setdefault((id(task.resident), id(task.embedding), task.multimask), []).append(task)
    return list(groups.values())
