"""Tensors into coded tensors, as a plan says, several at a time, and what that costs in bytes and in error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hypersam.allocation import Choice
from hypersam.cores import usable_cores
from kernels.codec import BirkhoffConfig, Encoded, HalfTensor, RawTensor, decode, encode, lattice, orbit

_MERGED_COLUMNS = 128
_PIECE = 1 << 20


@dataclass(frozen=True)
class EncodedTensor:
    """A coded tensor with Σw² and Σ(w − ŵ)² over its weights, both None where nothing can differ."""

    encoded: Encoded
    signal: float | None
    error: float | None

    @property
    def nbytes(self) -> int:
        """Bytes of its stream."""
        return stream_bytes(self.encoded)

    @property
    def sqnr_db(self) -> float | None:
        """Its signal-to-noise ratio; None for a tensor that came through as it was."""
        return sqnr_db([self])


def stream_bytes(encoded: Encoded) -> int:
    """Bytes that a tensor takes in the artifact, its record in the header not counted."""
    return encoded.tensor.nbytes if isinstance(encoded, RawTensor) else encoded.stream().numel()


def columns_of(shape: tuple[int, ...]) -> int:
    """Weights in a row of the matrix that a tensor is coded as.

    A matrix is itself and a convolution's row is an output channel; a table of positions (1, h, w, c) has rows
    of c; a vector is one row. Rows under 128 weights are joined, as many as divide the rows evenly, because
    every row has a scale or a class of its own.
    """
    if len(shape) < 2 or 0 in shape:
        return max(1, math.prod(shape))
    columns = shape[-1] if shape[0] == 1 else math.prod(shape[1:])
    rows = math.prod(shape) // columns
    for joined in range(1, rows + 1):
        if columns * joined >= _MERGED_COLUMNS and rows % joined == 0:
            return columns * joined
    return math.prod(shape)


def offset_of(tensor: Tensor) -> float:
    """What is taken from every weight before it is coded: a vector's mean, rounded to fp32; nothing from others.

    Norms' weights lie about one; a matrix that layers multiply with has no room for an offset.
    """
    return float(tensor.double().mean().float()) if tensor.ndim < 2 and tensor.numel() else 0.0


def as_fp32(step: float) -> float:
    """The step as an artifact keeps it."""
    return float(np.float32(step))


def encode_tensor(tensor: Tensor, choice: Choice, *, layer: bool) -> Encoded:
    """Code one tensor. What a codec cannot take (NaN, infinity, integers) is kept as it is.

    ``layer``: whether a linear layer multiplies with it, which needs rows that are the layer's own for ``orbit``.
    """
    if choice.encoding == "raw" or not tensor.dtype.is_floating_point:
        return RawTensor(tensor)
    if choice.encoding == "half":
        return HalfTensor.of(tensor) or RawTensor(tensor)
    columns = columns_of(tuple(tensor.shape))
    try:
        if choice.encoding == "lattice":
            assert choice.step is not None
            return lattice.encode(tensor, as_fp32(choice.step), columns=columns, offset=offset_of(tensor))
        assert choice.k is not None
        return orbit.encode(tensor, choice.k, columns=tensor.shape[-1] if layer else columns)
    except ValueError:
        return RawTensor(tensor)


def encode_all(
    tensors: Mapping[str, Tensor],
    choices: Mapping[str, Choice],
    layers: frozenset[str],
    *,
    progress: Callable[[int], None],
    threads: int | None = None,
) -> dict[str, EncodedTensor]:
    """Code every tensor as its choice says, on several threads. ``progress`` is told the bytes done so far."""

    def one(name: str) -> EncodedTensor:
        tensor = tensors[name]
        with torch.inference_mode():
            encoded = encode_tensor(tensor, choices[name], layer=name in layers)
            if isinstance(encoded, RawTensor):
                return EncodedTensor(encoded, None, None)
            return EncodedTensor(encoded, *squares(tensor, decode(encoded)))

    found: dict[str, EncodedTensor] = {}
    done = 0
    progress(done)
    # The largest first, so that no thread is left with one at the end.
    order = sorted(tensors, key=lambda name: -tensors[name].numel())
    with ThreadPoolExecutor(threads or usable_cores(), thread_name_prefix="encode") as pool:
        running: dict[Future[EncodedTensor], str] = {pool.submit(one, name): name for name in order}
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(future)
                    found[name] = future.result()
                    done += tensors[name].nbytes
                progress(done)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return {name: found[name] for name in tensors}


def encode_birkhoff(
    tensors: Mapping[str, Tensor],
    config: BirkhoffConfig,
    *,
    layers: frozenset[str],
    buffers: frozenset[str],
    device: torch.device,
    progress: Callable[[int], None],
) -> dict[str, EncodedTensor]:
    """Code every tensor by the published codec, which has no plan: it decides for each tensor alone."""
    found = {}
    done = 0
    for name, tensor in tensors.items():
        progress(done)
        encoded = encode(tensor.to(device), config, by_row=name in layers, keep_raw=name in buffers)
        if isinstance(encoded, RawTensor):
            found[name] = EncodedTensor(RawTensor(tensor), None, None)
        else:
            found[name] = EncodedTensor(encoded, *squares(tensor, decode(encoded)))
        done += tensor.nbytes
    progress(done)
    return found


def squares(weight: Tensor, decoded: Tensor) -> tuple[float, float]:
    """Σw² and Σ(w−ŵ)² in float64, in pieces, so that no whole copy in float64 is made."""
    signal = error = 0.0
    for w, d in zip(weight.flatten().split(_PIECE), decoded.flatten().split(_PIECE), strict=True):
        w64 = w.to(torch.float64, copy=True)  # a float64 weight would be its own copy
        signal += float(torch.dot(w64, w64))
        w64 -= d
        error += float(torch.dot(w64, w64))
    return signal, error


def sqnr_db(tensors: Iterable[EncodedTensor]) -> float | None:
    """10·log10 of Σw² / Σ(w−ŵ)² over the tensors that have errors; None where it is no finite number."""
    listed = [(t.signal, t.error) for t in tensors if t.signal is not None and t.error is not None]
    return decibels(math.fsum(s for s, _ in listed), math.fsum(e for _, e in listed))


def decibels(signal: float, error: float) -> float | None:
    """10·log10(signal / error); None where it is no finite number."""
    if not (signal > 0 and error > 0 and math.isfinite(signal) and math.isfinite(error)):
        return None
    return 10 * math.log10(signal / error)
