"""The models in memory: within a budget of bytes, loaded once however many ask, the least recently used leave."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from hypersam.cores import use_cores
from hypersam.engine.flights import Flight, Flights
from hypersam.engine.memory import out_of_memory, release
from hypersam.engine.prompts import ModelFile
from hypersam.errors import NotACheckpoint, Unavailable, UnknownModel
from hypersam.loading import Residency, load_model
from hypersam.sam.model import SamModel

log = logging.getLogger(__name__)

LOADS_AT_ONCE = 2
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Resident:
    """A model in memory, the file it came from and the bytes that it holds."""

    file: ModelFile
    model: SamModel
    bytes: int


class ModelPool:
    """Models on one device. ``relieve`` is called when the device's memory is exhausted, to free what can be made anew.

    Loading has threads of its own, so requests for models that are there go on meanwhile. A model that leaves stays
    in memory until the requests that use it have ended.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, budget: int, relieve: Callable[[], None],
        resident: Residency = "auto",
    ) -> None:  # fmt: skip
        self._device, self._dtype, self._budget, self._relieve = device, dtype, budget, relieve
        self._resident = resident
        self._held: OrderedDict[str, Resident] = OrderedDict()
        self._lock = threading.Lock()
        self._flights: Flights[str, Resident] = Flights()
        self._threads = ThreadPoolExecutor(LOADS_AT_ONCE, "hypersam-load", use_cores, (1,))
        self.loads = 0

    async def get(self, file: ModelFile) -> Resident:
        """The model, loaded if need be. Raises UnknownModel, ArtifactError or Unavailable."""
        if (held := self.find(file.digest)) is not None:
            return held
        _, resident, _ = await self._flights.join(
            file.digest, lambda flight: self._threads.submit(self._fly, file, flight)
        )
        return resident

    def find(self, digest: str) -> Resident | None:
        """The model if it is in memory; it counts as used now."""
        with self._lock:
            held = self._held.get(digest)
            if held is not None:
                self._held.move_to_end(digest)
            return held

    def forget(self, digest: str) -> None:
        """Let a model go."""
        with self._lock:
            self._held.pop(digest, None)

    def residents(self) -> list[Resident]:
        """All models in memory, the least recently used first."""
        with self._lock:
            return list(self._held.values())

    def evict_others(self, digest: str) -> None:
        """Let every model but one go: its work needs their memory."""
        with self._lock:
            for other in [d for d in self._held if d != digest]:
                del self._held[other]

    def move_to_cpu(self, file: ModelFile) -> Resident:
        """Load the model on the CPU instead, until it leaves memory. Raises Unavailable on the CPU itself."""
        if self._device == _CPU:
            raise Unavailable(f"there is not enough memory for model {file.id!r}; a smaller model may fit")
        held = self.find(file.digest)
        if held is not None and held.model.device == _CPU:
            return held
        log.warning("model %s moves to the CPU: the device has no memory for it", file.id)
        return self._keep(file, self._read(file, _CPU))

    def close(self) -> None:
        """Finish the loads that run and let all models go."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._held.clear()

    def _fly(self, file: ModelFile, flight: Flight[Resident]) -> None:
        if not flight.claim():
            return
        try:
            flight.future.set_result(self.find(file.digest) or self._load(file))
        except BaseException as error:
            flight.future.set_exception(error)

    def _load(self, file: ModelFile) -> Resident:
        try:
            self._make_room(file.path.stat().st_size)
            model = self._try_load(file)
            if model is None:
                self.evict_others(file.digest)
                self._relieve()
                release()
                model = self._try_load(file)
            if model is None:
                return self.move_to_cpu(file)
        except (FileNotFoundError, NotACheckpoint) as error:
            raise UnknownModel(f"model {file.id!r} was deleted while the request waited") from error
        return self._keep(file, model)

    def _try_load(self, file: ModelFile) -> SamModel | None:
        """The model, or None where the device has no memory for it."""
        try:
            return self._read(file, self._device)
        except Exception as error:
            if not out_of_memory(error):
                raise
            log.warning("no memory to load model %s: %s", file.id, error)
            return None

    def _read(self, file: ModelFile, device: torch.device) -> SamModel:
        return load_model(file.path, device=device, dtype=self._dtype, resident=self._resident, memory=self._budget)

    def _keep(self, file: ModelFile, model: SamModel) -> Resident:
        resident = Resident(file, model, model.resident_bytes() + model.network.remembered_bytes())
        with self._lock:
            self.loads += 1
            self._held[file.digest] = resident
            self._held.move_to_end(file.digest)
        self._make_room(0)
        log.info("loaded model %s (%d bytes resident)", file.id, resident.bytes)
        return resident

    def _make_room(self, incoming: int) -> None:
        """Evict until the budget holds, with so many bytes more; the one used last stays when nothing comes."""
        keep = 0 if incoming else 1
        with self._lock:
            total = incoming + sum(r.bytes for r in self._held.values())
            while total > self._budget and len(self._held) > keep:
                _, gone = self._held.popitem(last=False)
                total -= gone.bytes
                log.info("model %s leaves memory (%d bytes)", gone.file.id, gone.bytes)
