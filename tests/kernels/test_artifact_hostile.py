"""Artifacts that were damaged by a bit, or written to break their reader."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.artifact import FREE_WEIGHTS, MAX_HEADER_BYTES, WEIGHTS_PER_BYTE, open_artifact, write
from kernels.codec import BirkhoffConfig, Encoded, HalfTensor, RawTensor, encode, lattice, orbit
from kernels.errors import ArtifactCorrupt, ArtifactError, ArtifactVersion
from tests.kernels.test_artifact import HEADER, record, rewrite
from tests.memory import peak_bytes


def tensors() -> dict[str, Encoded]:
    """One of every encoding."""
    torch.manual_seed(3)
    half = HalfTensor.of(torch.randn(9))
    assert half is not None
    return {
        "birkhoff": encode(torch.randn(16, 20) * 0.02, BirkhoffConfig(), by_row=True),
        "lattice": lattice.encode(torch.randn(8, 64), 0.1, columns=64),
        "zeros": lattice.encode(torch.zeros(8, 64), 0.1, columns=64),
        "orbit": orbit.encode(torch.randn(8, 64), 4, columns=64),
        "half": half,
        "raw": RawTensor(torch.randn(5)),
        "constant": encode(torch.full((12, 2), 1e8), BirkhoffConfig(), by_row=True),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "model.hsam"
    write(target, tensors(), **HEADER)
    return target


def start_of_streams(data: bytes) -> int:
    return 8 + int(struct.unpack("<Q", data[:8])[0])


def test_every_bit_of_the_prefix_counts(path: Path) -> None:
    """Length, safetensors' JSON, its padding, the packed header: no bit can be flipped unnoticed."""
    data = path.read_bytes()
    prefix = start_of_streams(data)
    last = data.index(b'"header_sha256"')
    everything = {*range(0, 128), *range(last - 64, last + 32), *range(prefix - 16, prefix)}
    for place in range(prefix):
        for bit in range(8) if place in everything else ((place * 5) % 8,):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(ArtifactError):
                open_artifact(path)


def test_every_bit_of_the_streams_counts_and_the_tensor_is_named(path: Path) -> None:
    data = path.read_bytes()
    prefix = start_of_streams(data)
    spans = {
        name: entry["data_offsets"] for name, entry in json.loads(data[8:prefix]).items() if name != "__metadata__"
    }
    for place in range(prefix, len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        name = next(n for n, (start, end) in spans.items() if start <= place - prefix < end)
        with pytest.raises(ArtifactCorrupt, match=f"^{name}: the checksum"):
            open_artifact(path)


@pytest.mark.parametrize("version", ["0", "2", "1.0", "", "one", None, 1])
def test_other_versions_say_so(path: Path, version: object) -> None:
    def change(metadata: dict[str, Any], header: dict[str, Any]) -> None:
        metadata["format_version"] = version
        if version is None:
            del metadata["format_version"]

    rewrite(path, change)
    with pytest.raises(ArtifactVersion, match="this release reads version 1"):
        open_artifact(path)


HUGE = [1 << 20, 1 << 30]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("zeros", {"shape": [1, 1 << 40], "columns": 1 << 40}),
        ("zeros", {"shape": [8, 1 << 40], "columns": 1 << 40}),
        ("lattice", {"shape": HUGE, "columns": 1 << 30}),
        ("constant", {"shape": HUGE}),
        ("constant", {"shape": [1 << 62, 1 << 62]}),
        ("half", {"shape": HUGE}),
        ("orbit", {"shape": HUGE, "columns": 1 << 30}),
        ("raw", {"shape": HUGE}),
        ("constant", {"shape": [FREE_WEIGHTS, 3]}),
    ],
)
def test_shapes_beyond_what_the_file_can_hold_are_refused_at_once(
    path: Path, name: str, change: dict[str, Any]
) -> None:
    rewrite(path, lambda metadata, header: record(header, name).update(change))
    with pytest.raises(ArtifactError, match=r"declares .* weights in"):
        open_artifact(path, verify=False)


@pytest.mark.parametrize("name", ["lattice", "orbit", "constant", "half", "raw", "birkhoff", "zeros"])
@pytest.mark.parametrize(
    "shape", [[1 << 62] * 60, [10**400, 1], [1 << 63, 0], [1] * 65, [True, 5], [5.0], ["5"], "55", [-1], [[5]], [None]],
    ids=lambda shape: str(shape)[:20],
)  # fmt: skip
def test_shapes_that_are_none_are_refused(path: Path, name: str, shape: Any) -> None:
    rewrite(path, lambda metadata, header: record(header, name).update(shape=shape))
    with pytest.raises(ArtifactError, match=r"declares .* weights in|the header lacks or misstates"):
        open_artifact(path, verify=False)


@pytest.mark.parametrize("end", ["1e400", "NaN", "8.0", '"8"', "null", "1" + "0" * 5000, "-1"])
def test_offsets_that_are_none_are_refused(path: Path, end: str) -> None:
    data = path.read_bytes()
    prefix = start_of_streams(data)
    text = re.sub(rb'("data_offsets":\[\d+,)\d+', rb"\g<1>" + end.encode(), data[8:prefix])
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[prefix:])
    with pytest.raises(ArtifactError):
        open_artifact(path, verify=False)


def test_the_caller_may_set_a_limit(path: Path) -> None:
    declared = sum(t.numel() for t in open_artifact(path).state_dict().values())
    open_artifact(path, max_weights=declared).close()
    with pytest.raises(ArtifactError, match=f"declares {declared} weights; at most {declared - 1}"):
        open_artifact(path, max_weights=declared - 1)


def packed(path: Path, text: bytes) -> None:
    """Give the file another header, with a fitting checksum."""
    data = path.read_bytes()
    prefix = start_of_streams(data)
    entries = json.loads(data[8:prefix])
    metadata = entries["__metadata__"]
    metadata["header"] = base64.b64encode(zlib.compress(text, 9)).decode()
    metadata["header_sha256"] = hashlib.sha256(text).hexdigest()
    outer = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(outer)) + outer + data[prefix:])


def test_header_bombs(path: Path) -> None:
    for text in (b'{"codec":"' + b"a" * (1 << 28) + b'"}', b"[" * 100_000, b"[" + b"1," * 1000 + b"1]", b"1" * 10_000):
        packed(path, text)
        with pytest.raises(ArtifactCorrupt):
            open_artifact(path)


def test_what_a_header_may_hold_takes_little_memory(path: Path) -> None:
    """Lists in lists take the most of all JSON. Packed, so many take a few kB."""
    unit = b"[" * 90 + b"]" * 90 + b","
    packed(path, b'{"codec":[' + unit * ((MAX_HEADER_BYTES - 30) // len(unit)) + b"0]}")
    assert path.stat().st_size < 1 << 17
    measured = """
try:
    open_artifact(sys.argv[1])
    raise SystemExit("it was read")
except ArtifactError:
    pass"""
    before = "from kernels.artifact import open_artifact\nfrom kernels.errors import ArtifactError"
    assert peak_bytes(before, measured, str(path)) < 200 << 20
    packed(path, b'{"codec":[' + unit * (1 + MAX_HEADER_BYTES // len(unit)) + b"0]}")
    with pytest.raises(ArtifactCorrupt, match="unpacked"):
        open_artifact(path)


def test_a_long_prefix_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "long.hsam"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_000) + b"{")
        file.truncate(100_001_000)
    with pytest.raises(ArtifactError, match=f"at most {MAX_HEADER_BYTES}|{MAX_HEADER_BYTES} are read"):
        open_artifact(path)


def test_memory_is_bounded_by_the_file(path: Path) -> None:
    """What a small file may declare at most, decoded."""
    size = path.stat().st_size
    rows = (WEIGHTS_PER_BYTE * size + FREE_WEIGHTS - 4000) // 2
    rewrite(path, lambda metadata, header: record(header, "constant").update(shape=[rows, 2]))
    used = peak_bytes(
        "from kernels.artifact import open_artifact",
        "with open_artifact(Path(sys.argv[1])) as artifact: artifact.state_dict()",
        str(path),
    )
    print(used / (2 * rows), "bytes a declared weight")
    assert 4 * 2 * rows < used < 20 * 2 * rows + (64 << 20)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    "shape", "dtype", "encoding", "columns", "step", "offset", "beta", "k", "law", "block", "seed", "exponent",
    "by_row", "centre", "radius", "side", "nodes", "classes", "bits", "mean_error", "outliers", "sha256",
]  # fmt: skip
VALUES = st.one_of(
    JSON, st.sampled_from(["raw", "half", "lattice", "orbit", "birkhoff", "F32", "F16", "U8", "I64"]),
    st.lists(st.sampled_from([0, 1, 2, 8, 20, 64, 320, 512, 1 << 20, 1 << 40]), max_size=3),
)  # fmt: skip


@settings(
    max_examples=400, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(st.sampled_from(sorted(tensors())), st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_records_of_any_values(tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    """A header that fits its own checksum and says anything: an error of ours, or tensors of the declared shapes."""
    path = tmp_path / "fuzzed.hsam"
    write(path, tensors(), **HEADER)
    rewrite(path, lambda metadata, header: record(header, name).update(change))
    try:
        with open_artifact(path) as artifact:
            shapes = {r.name: r.shape for r in artifact.records}
            state = artifact.state_dict()
    except ArtifactError:
        return
    assert {key: tuple(value.shape) for key, value in state.items()} == shapes
