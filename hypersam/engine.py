"""Models that stay resident and answer prompts: one thread for the device, a bounded cache of embeddings.

The engine's thread is the only one that touches a network, so nothing of it needs a lock; callers on an
event loop await, and the loop stays free while an encoder runs.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hypersam.errors import NotACheckpoint, Overloaded, PromptError, UnknownImage, UnknownModel
from hypersam.loading import load_model, resolve_device
from hypersam.sam.model import Embedding, SamModel
from hypersam.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFile:
    """A compressed model on disk: the name it was given, its artifact, and that file's SHA-256."""

    id: str
    path: Path
    digest: str


@dataclass(frozen=True)
class Prompt:
    """One thing to find, in pixels (x, y) of the picture as sent.

    ``labels`` has a 1 (inside) or 0 (outside) a point; ``box`` is x0, y0, x1, y1; ``mask_input`` is (s, s)
    logits of an earlier answer. At least one of points, box and mask input is there.
    """

    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()
    box: tuple[float, float, float, float] | None = None
    mask_input: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Mask:
    """One answer: the prompt's index, the predicted IoU, (x, y, w, h), area in pixels, and the mask (H, W)."""

    prompt: int
    score: float
    bbox: tuple[int, int, int, int]
    area: int
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Segmentation:
    """Masks of a picture, best first within a prompt. ``timings`` are milliseconds by stage; ``cached`` tells
    whether the embedding was at hand."""

    image_id: str
    width: int
    height: int
    masks: tuple[Mask, ...]
    timings: dict[str, float]
    cached: bool


def image_id_of(image: NDArray[np.uint8]) -> str:
    """A picture's id: SHA-256 of its size and pixels, so that the same picture has the same id in any format."""
    digest = hashlib.sha256(f"{image.shape[0]}x{image.shape[1]}:".encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()[:32]


class Engine:
    """Serves prompts against compressed models.

    ``settings`` gives the device, the encoder's dtype, the bytes of models that may be resident, the bytes
    of embeddings kept, and how many requests may wait.
    """

    def __init__(self, settings: Settings) -> None:
        self._device = resolve_device(settings.device)
        self._dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
        self._resident_limit = settings.resident_bytes
        self._embedding_limit = settings.embedding_cache_bytes
        self._waiting_limit = settings.max_waiting
        self._models: OrderedDict[str, SamModel] = OrderedDict()
        self._embeddings: OrderedDict[tuple[str, str], Embedding] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hypersam-engine")
        self._waiting = 0
        self._waiting_lock = threading.Lock()
        self._hits = self._misses = self._loads = 0

    async def segment(
        self,
        model: ModelFile,
        image: NDArray[np.uint8] | None,
        prompts: Sequence[Prompt],
        *,
        multimask: bool,
        image_id: str | None = None,
    ) -> Segmentation:
        """Masks for prompts on a picture (uint8, H x W x 3, RGB), or on one seen before by its ``image_id``.

        Raises PromptError, UnknownImage, Overloaded, or ArtifactError where the model cannot be loaded.
        """
        self._enter()
        try:
            queued = time.perf_counter()
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(
                self._thread, self._segment, model, image, tuple(prompts), multimask, image_id, queued
            )
        finally:
            self._leave()

    def segment_sync(
        self,
        model: ModelFile,
        image: NDArray[np.uint8] | None,
        prompts: Sequence[Prompt],
        *,
        multimask: bool,
        image_id: str | None = None,
    ) -> Segmentation:
        """The same, blocking."""
        self._enter()
        try:
            queued = time.perf_counter()
            return self._thread.submit(
                self._segment, model, image, tuple(prompts), multimask, image_id, queued
            ).result()
        finally:
            self._leave()

    def forget(self, digest: str) -> None:
        """Drop a model and its embeddings, once what runs has ended."""
        self._thread.submit(self._forget, digest)

    def stats(self) -> dict[str, Any]:
        """Counts and bytes for the metrics, as of now."""
        models, embeddings = list(self._models.values()), list(self._embeddings.values())
        return {
            "device": str(self._device),
            "resident_models": len(models),
            "resident_bytes": sum(m.resident_bytes() for m in models),
            "model_loads": self._loads,
            "embeddings": len(embeddings),
            "embedding_bytes": sum(e.nbytes for e in embeddings),
            "embedding_hits": self._hits,
            "embedding_misses": self._misses,
            "waiting": self._waiting,
        }

    def close(self) -> None:
        """Finish what runs, refuse what waits, let the models go."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._models.clear()
        self._embeddings.clear()

    # Everything below runs on the engine's thread, but for the counter of those who wait.

    def _enter(self) -> None:
        with self._waiting_lock:
            if self._waiting >= self._waiting_limit:
                raise Overloaded(f"{self._waiting} requests are waiting already; try again in a moment")
            self._waiting += 1

    def _leave(self) -> None:
        with self._waiting_lock:
            self._waiting -= 1

    def _forget(self, digest: str) -> None:
        self._models.pop(digest, None)
        for key in [k for k in self._embeddings if k[0] == digest]:
            del self._embeddings[key]

    def _segment(
        self,
        file: ModelFile,
        image: NDArray[np.uint8] | None,
        prompts: tuple[Prompt, ...],
        multimask: bool,
        image_id: str | None,
        queued: float,
    ) -> Segmentation:
        clock = _Clock(queued)
        clock.lap("queue")
        if image is not None:
            check_prompts(prompts, image.shape[1], image.shape[0])
            image_id = image_id_of(image)
        elif image_id is None:
            raise PromptError("a picture or an image_id is needed")
        clock.lap("hash")
        model = self._model(file)
        clock.lap("load")
        embedding, cached = self._embedding(file, model, image, image_id)
        clock.lap("encode")
        height, width = embedding.original_size
        if image is None:
            check_prompts(prompts, width, height)
        size = len(prompts) * (3 if multimask else 1) * width * height
        if size > _MASK_BYTES:
            raise PromptError(
                f"{len(prompts)} prompts on a picture of {width} x {height} pixels give {size >> 20} MiB of masks; "
                f"at most {_MASK_BYTES >> 20} are given at once, so send fewer prompts at a time"
            )
        masks = predict(model, embedding, prompts, multimask=multimask)
        clock.lap("decode")
        return Segmentation(image_id, width, height, masks, clock.laps, cached)

    def _model(self, file: ModelFile) -> SamModel:
        model = self._models.get(file.digest)
        if model is None:
            try:
                model = load_model(file.path, device=self._device, dtype=self._dtype)
            except (FileNotFoundError, NotACheckpoint) as error:
                raise UnknownModel(f"model {file.id!r} was deleted while the request waited") from error
            self._loads += 1
            self._models[file.digest] = model
            log.info("loaded model %s (%d bytes resident)", file.id, model.resident_bytes())
            while len(self._models) > 1 and self.stats()["resident_bytes"] > self._resident_limit:
                self._models.popitem(last=False)
        self._models.move_to_end(file.digest)
        return model

    def _embedding(
        self, file: ModelFile, model: SamModel, image: NDArray[np.uint8] | None, image_id: str
    ) -> tuple[Embedding, bool]:
        key = (file.digest, image_id)
        if (held := self._embeddings.get(key)) is not None:
            self._embeddings.move_to_end(key)
            self._hits += 1
            return held, True
        if image is None:
            raise UnknownImage(f"no embedding of image {image_id} is held for model {file.id}; send the picture")
        self._misses += 1
        embedding = model.embed(image)
        self._embeddings[key] = embedding
        total = sum(e.nbytes for e in self._embeddings.values())
        while total > self._embedding_limit and len(self._embeddings) > 1:
            total -= self._embeddings.popitem(last=False)[1].nbytes
        return embedding, False


class _Clock:
    """Milliseconds from lap to lap."""

    def __init__(self, began: float) -> None:
        self._last = began
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(1000 * (now - self._last), 3)
        self._last = now


def check_prompts(prompts: Sequence[Prompt], width: int, height: int) -> None:
    """Raise PromptError, saying which prompt and why, unless every prompt fits a picture of that size."""
    if not prompts:
        raise PromptError("at least one prompt is needed: points with labels, a box, or both")
    for number, prompt in enumerate(prompts):
        where = f"prompt {number}: " if len(prompts) > 1 else ""
        if not prompt.points and prompt.box is None and prompt.mask_input is None:
            raise PromptError(f"{where}give points with labels, a box, or both")
        if len(prompt.points) != len(prompt.labels):
            raise PromptError(f"{where}{len(prompt.points)} points need as many labels, got {len(prompt.labels)}")
        for label in prompt.labels:
            if label not in (0, 1):
                raise PromptError(f"{where}a label is 1 (inside) or 0 (outside), not {label}")
        for x, y in prompt.points:
            # NaN fails every comparison and so is refused as well.
            if not (0 <= x <= width and 0 <= y <= height):
                raise PromptError(f"{where}point ({x:g}, {y:g}) is outside the picture of {width} x {height} pixels")
        if prompt.box is not None:
            x0, y0, x1, y1 = prompt.box
            if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
                box = ", ".join(f"{v:g}" for v in prompt.box)
                raise PromptError(
                    f"{where}box [{box}] must be [x0, y0, x1, y1] with x0 < x1 and y0 < y1 "
                    f"inside the picture of {width} x {height} pixels"
                )


def predict(model: SamModel, embedding: Embedding, prompts: Sequence[Prompt], *, multimask: bool) -> tuple[Mask, ...]:
    """Masks of all prompts. Prompts of one form (points, box or not, mask input or not) are decoded together."""
    forms: dict[tuple[int, bool, bool], list[int]] = {}
    for number, prompt in enumerate(prompts):
        form = (len(prompt.points), prompt.box is not None, prompt.mask_input is not None)
        forms.setdefault(form, []).append(number)
    answers: dict[int, list[Mask]] = {}
    for form, numbers in forms.items():
        for start in range(0, len(numbers), _AT_ONCE):
            part = numbers[start : start + _AT_ONCE]
            low_res, scores = _decode(model, embedding, [prompts[n] for n in part], form, multimask)
            for row, number in enumerate(part):
                # Upscaled one by one: a large picture times many prompts would not fit in memory.
                full = model.binary(model.upscale(low_res[row : row + 1], embedding)[0])
                answers[number] = _masks(number, full.cpu().numpy(), scores[row].tolist())
    return tuple(mask for number in sorted(answers) for mask in answers[number])


_MASK_BYTES = 1 << 30
"""Bytes of full-size masks, one a pixel, that one request may ask for."""

_AT_ONCE = 32
"""Prompts decoded in one call."""


def _decode(
    model: SamModel,
    embedding: Embedding,
    prompts: Sequence[Prompt],
    form: tuple[int, bool, bool],
    multimask: bool,
) -> tuple[Tensor, Tensor]:
    points, has_box, has_mask = form
    clicks = boxes = masks = None
    if points:
        coordinates = torch.tensor([p.points for p in prompts], dtype=torch.float64, device=model.device)
        labels = torch.tensor([p.labels for p in prompts], dtype=torch.int, device=model.device)
        clicks = (model.scale_coordinates(coordinates, embedding), labels)
    if has_box:
        corners = torch.tensor([p.box for p in prompts], dtype=torch.float64, device=model.device)
        boxes = model.scale_coordinates(corners.view(-1, 2, 2), embedding).view(-1, 4)
    if has_mask:
        side = model.low_res
        given = [np.asarray(p.mask_input, np.float32) for p in prompts]
        for mask in given:
            if mask.shape != (side, side):
                raise PromptError(f"a mask input for this model is {side} x {side} logits, got {mask.shape}")
        masks = torch.from_numpy(np.stack(given))[:, None].to(model.device)
    return model.decode(embedding, clicks, boxes, masks, multimask=multimask)


def _masks(prompt: int, masks: NDArray[np.bool_], scores: Sequence[float]) -> list[Mask]:
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return [Mask(prompt, scores[i], bounding_box(masks[i]), int(masks[i].sum()), masks[i]) for i in order]


def bounding_box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """(x, y, w, h) of the set pixels; all zeros for an empty mask."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(ys):
        return 0, 0, 0, 0
    return int(xs[0]), int(ys[0]), int(xs[-1] - xs[0]) + 1, int(ys[-1] - ys[0]) + 1
