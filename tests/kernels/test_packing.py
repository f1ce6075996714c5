"""Bit packing."""

from __future__ import annotations

import pytest
import torch

from kernels.codec.packing import pack, stream_bytes, unpack


def reference(indices: list[int], bits: int) -> bytes:
    """The stream as one large number."""
    number = sum(value << (position * bits) for position, value in enumerate(indices))
    return number.to_bytes(stream_bytes(len(indices), bits), "little")


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_matches_the_definition_and_comes_back(bits: int, count: int) -> None:
    indices = torch.randint(0, 1 << bits, (count,))
    stream = pack(indices, bits)
    assert stream.numpy().tobytes() == reference(indices.tolist(), bits)
    back = unpack(stream, bits, count)
    assert back.dtype == (torch.int16 if bits < 16 else torch.int32)
    assert torch.equal(back.long(), indices)


@pytest.mark.parametrize("count", [131_072, 131_073, 300_001])
def test_many_chunks(count: int) -> None:
    indices = torch.randint(0, 1 << 13, (count,), dtype=torch.int32)
    assert torch.equal(unpack(pack(indices, 13), 13, count).int(), indices)


def test_zero_bits_and_no_indices() -> None:
    assert pack(torch.zeros(5, dtype=torch.int32), 0).numel() == 0
    assert unpack(torch.empty(0, dtype=torch.uint8), 0, 5).tolist() == [0] * 5
    assert unpack(pack(torch.empty(0, dtype=torch.int32), 7), 7, 0).numel() == 0


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit 3 bits"):
        pack(torch.tensor([8]), 3)
    with pytest.raises(ValueError, match="do not fit"):
        pack(torch.tensor([-1]), 3)
    with pytest.raises(ValueError, match="bits must be"):
        pack(torch.tensor([1]), 17)
    with pytest.raises(ValueError, match="take 2 bytes, not 3"):
        unpack(torch.zeros(3, dtype=torch.uint8), 5, 3)
    with pytest.raises(ValueError, match="uint8 vector"):
        unpack(torch.zeros(3, dtype=torch.int32), 8, 3)
