"""Bit packing: indices of a fixed number of bits as a stream of bytes.

Index i fills the bits i·b … i·b + b − 1 of the stream, its least significant bit first; bit j of the stream is
bit j mod 8 of byte j // 8. The unused bits of the last byte are zero.

Eight indices of b bits fill b whole bytes. Each of those bytes is put together from the few indices that reach
into it, for all groups of eight at once, so that no bit is ever handled on its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_BITS = 16
_GROUP = 8
# Groups handled at once: the columns stay in the cache and below torch's threshold for threads, whose
# barriers cost more than the work when the cores are shared.
_GROUPS_PER_CHUNK = 2000


def stream_bytes(count: int, bits: int) -> int:
    """Number of bytes that ``count`` indices of ``bits`` bits take."""
    return (count * bits + 7) // 8


def pack(indices: Tensor, bits: int) -> Tensor:
    """The stream of ``indices`` (any shape, any integer dtype, values 0 … 2^bits − 1): a uint8 vector.

    The result is on the device of ``indices``. Raises ValueError for bits outside 0 … 16, and for an index
    that does not fit them.
    """
    _check_bits(bits)
    flat = indices.reshape(-1)
    count = flat.numel()
    if count:
        low, high = (int(value) for value in flat.aminmax())
        if low < 0 or high >> bits:
            raise ValueError(f"indices from {low} to {high} do not fit {bits} bits")
    stream = torch.empty(stream_bytes(count, bits), dtype=torch.uint8, device=flat.device)
    if bits == 0:
        return stream
    step = _GROUPS_PER_CHUNK * _GROUP
    for start in range(0, count, step):
        part = flat[start : start + step]
        groups = -(-part.numel() // _GROUP)
        columns = torch.zeros(groups * _GROUP, dtype=torch.int32, device=flat.device)
        columns[: part.numel()] = part
        columns = columns.view(groups, _GROUP).t().contiguous()
        packed = torch.empty((groups, bits), dtype=torch.uint8, device=flat.device)
        for byte in range(bits):
            value = torch.zeros(groups, dtype=torch.int32, device=flat.device)
            for lane in range(_GROUP):
                shift = lane * bits - byte * 8
                if -bits < shift < 8:
                    value |= columns[lane] << shift if shift >= 0 else columns[lane] >> -shift
            # The cast keeps the low eight bits, which are this byte's share.
            packed[:, byte] = value & 0xFF
        target = stream[start * bits // 8 : stream_bytes(start + part.numel(), bits)]
        target.copy_(packed.view(-1)[: target.numel()])
    return stream


def unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """The ``count`` indices of a stream (uint8 vector): int16 up to 15 bits, else int32, on its device.

    Raises ValueError for bits outside 0 … 16, and for a stream of another length than the indices take.
    """
    _check_bits(bits)
    if stream.dtype != torch.uint8 or stream.dim() != 1:
        raise ValueError("a stream is a uint8 vector")
    expected = stream_bytes(count, bits)
    if stream.numel() != expected:
        raise ValueError(f"{count} indices of {bits} bits take {expected} bytes, not {stream.numel()}")
    dtype = torch.int16 if bits < 16 else torch.int32
    if bits == 0:
        return torch.zeros(count, dtype=dtype, device=stream.device)
    indices = torch.empty(count, dtype=dtype, device=stream.device)
    mask = (1 << bits) - 1
    step = _GROUPS_PER_CHUNK * _GROUP
    for start in range(0, count, step):
        part = indices[start : start + step]
        groups = -(-part.numel() // _GROUP)
        source = stream[start * bits // 8 : stream_bytes(start + part.numel(), bits)]
        if source.numel() < groups * bits:
            source = torch.cat((source, source.new_zeros(groups * bits - source.numel())))
        columns = source.view(groups, bits).t().to(torch.int32).contiguous()
        lanes = torch.empty((groups, _GROUP), dtype=dtype, device=stream.device)
        for lane in range(_GROUP):
            first = lane * bits // 8
            last = (lane * bits + bits - 1) // 8
            value = columns[first] >> (lane * bits - first * 8)
            for byte in range(first + 1, last + 1):
                value |= columns[byte] << (byte * 8 - lane * bits)
            lanes[:, lane] = value & mask
        part.copy_(lanes.view(-1)[: part.numel()])
    return indices


def _check_bits(bits: int) -> None:
    if not 0 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be from 0 to {MAX_BITS}, not {bits}")
