"""Files that chance and Hypothesis make: each is refused with a code, or gives tensors that its bytes can hold."""

from __future__ import annotations

import io
import tempfile
import zipfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from hypersam.checkpoint import MAX_KEY, read_checkpoint
from hypersam.checkpoint_files import MAX_REUSE
from hypersam.errors import CheckpointError
from tests.hypersam import crafted

# A share of a second each, some twenty seconds in all on two cores.
FUZZ = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
STATE = {
    "model": {
        "a.weight": torch.arange(12.0).view(3, 4),
        "a.bias": torch.ones(3).half(),
        "table": torch.arange(6).view(2, 3).t(),
    },
    "epoch": 4,
}


def saved(*, zipped: bool) -> bytes:
    out = io.BytesIO()
    torch.save(STATE, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


SEEDS = (saved(zipped=True), saved(zipped=False), save({k: v.contiguous() for k, v in STATE["model"].items()}))


def check(data: bytes) -> bool:
    """Whether the file is read; what is read must fit what was in the file."""
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        file.write(data)
        file.flush()
        try:
            found = read_checkpoint(Path(file.name))
        except CheckpointError as error:
            message = str(error)
        else:
            message = ""
        assert message.isprintable()
        assert len(message) < 2000
        if message:
            return False
        assert sum(t.numel() * t.element_size() for t in found.tensors.values()) <= MAX_REUSE * len(data)
        for key, value in found.tensors.items():
            assert key.isprintable()
            assert len(key) <= MAX_KEY
            assert value.layout is torch.strided
            value.clone()  # every byte of it can be looked at
    return True


def test_the_seeds_are_read() -> None:
    assert all(check(seed) for seed in SEEDS)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good file with bytes replaced, removed, repeated or cut off."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(("replace", "insert", "remove", "repeat", "cut", "zero"))):
            case "replace":
                data[place : place + 1] = draw(st.binary(min_size=1, max_size=8))
            case "insert":
                data[place:place] = draw(st.binary(min_size=1, max_size=8))
            case "remove":
                del data[place : place + draw(st.integers(1, 64))]
            case "repeat":
                data[place:place] = data[place : place + draw(st.integers(1, 256))]
            case "cut":
                del data[place:]
            case "zero":
                span = draw(st.integers(1, 16))
                data[place : place + span] = bytes(span)
    return bytes(data)


@settings(FUZZ, max_examples=1500)
@given(damaged())
def test_damaged_files(data: bytes) -> None:
    check(data)


SIZES = st.one_of(st.integers(0, 5), st.sampled_from([-1, 1 << 31, 1 << 50, 1 << 63, 1 << 90]))
SHAPES = st.lists(SIZES, max_size=3).map(tuple)
TENSORS = st.builds(
    crafted.tensor, SHAPES, SHAPES, count=st.one_of(st.just(8), SIZES), offset=SIZES,
    key=st.sampled_from(["0", "1"]),
    kind=st.sampled_from(["FloatStorage", "HalfStorage", "UntypedStorage", "BoolStorage"]),
)  # fmt: skip
INSTRUCTIONS = st.one_of(
    TENSORS,
    st.builds(crafted.text, st.text(max_size=8)),
    st.builds(crafted.number, st.integers(-5, 1 << 70).map(abs)),
    st.builds(lambda i: b"q" + bytes([i]), st.integers(0, 3)),
    st.builds(lambda i: b"h" + bytes([i]), st.integers(0, 3)),
    st.sampled_from([bytes([code]) for code in b"(0N)]}tleasu\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94QRbod1\x81"]),
    st.sampled_from([
        crafted.name("collections", "OrderedDict"), crafted.name("torch._utils", "_rebuild_parameter"),
        crafted.name("torch._utils", "_rebuild_tensor_v3"), crafted.name("torch._utils", "_rebuild_sparse_tensor"),
        crafted.name("torch._tensor", "_rebuild_from_type_v2"), crafted.name("torch", "float32"),
        crafted.name("builtins", "bytearray"), crafted.name("torch", "FloatStorage"),
    ]),
    st.binary(max_size=3),
)  # fmt: skip
PROGRAMS = st.lists(INSTRUCTIONS, max_size=40).map(b"".join)
STATES = st.lists(st.tuples(st.text(max_size=4), TENSORS), min_size=1, max_size=3).map(
    lambda items: crafted.dictionary(*items)
)


@settings(FUZZ, max_examples=1500)
@given(st.one_of(PROGRAMS, STATES))
def test_pickles_of_any_instructions(program: bytes) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as target:
        target.writestr("a/data.pkl", crafted.START + program + crafted.END)
        target.writestr("a/data/0", bytes(range(32)))
        target.writestr("a/data/1", bytes(8))
    check(out.getvalue())


ENTRIES = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "F16", "I8", "BOOL", "F8_E4M3", "F4", "C64", "nothing"]),
    "shape": st.lists(SIZES, max_size=3),
    "data_offsets": st.lists(st.one_of(SIZES, st.sampled_from([8, 16, 32])), max_size=3),
})  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4), lambda inner: st.lists(inner, max_size=3)
)


@settings(FUZZ, max_examples=500)
@given(st.dictionaries(st.text(max_size=4), st.one_of(ENTRIES, JSON), max_size=3))
def test_safetensors_of_any_header(header: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(crafted.safetensors(Path(folder) / "a", header, bytes(32)).read_bytes())
