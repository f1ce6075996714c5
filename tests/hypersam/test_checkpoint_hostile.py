"""Checkpoints made to break the reader: every one is refused with a code, or read right, in bounded memory."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hypersam import checkpoint as checkpoint_module
from hypersam.checkpoint import MEMORY_FACTOR, MEMORY_FLOOR, read_checkpoint
from hypersam.checkpoint_files import MAX_HEADER_BYTES
from hypersam.checkpoint_pickle import MAX_INSTRUCTIONS
from hypersam.errors import CheckpointError
from tests.hypersam.crafted import (
    END,
    FALSE,
    NONE,
    START,
    archive,
    called,
    dictionary,
    name,
    number,
    safetensors,
    state,
    storage,
    tensor,
    text,
    tuple_of,
)  # fmt: skip
from tests.models import official_sam

FOUR = torch.tensor([1.0, 2.0, 3.0, 4.0])
DATA = {"0": FOUR.numpy().tobytes()}
PETA = 1 << 50
ROOT = Path(checkpoint_module.__file__).parents[1]


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    return caught.value.code


def test_what_is_crafted_here_is_what_torch_reads(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pth", state(w=tensor((2, 2), (1, 2), count=4)), DATA)
    expected = torch.load(path, weights_only=True)["w"]
    found = read_checkpoint(path).tensors["w"]
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride() == (1, 2)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_everything_torch_writes_is_read_as_torch_reads_it(tmp_path: Path, protocol: int, zipped: bool) -> None:
    base = torch.arange(24.0)
    given = {
        "parameter": torch.nn.Parameter(torch.randn(2, 3)), "view": base[4:16].view(3, 4), "strided": base[::3],
        "turned": base.view(4, 6).t(), "same": base, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 7),
        "half": torch.randn(5).half(), "brain": torch.randn(5).bfloat16(), "double": torch.randn(3).double(),
        "long": torch.arange(3), "flags": torch.tensor([True, False]), "byte": torch.arange(5, dtype=torch.uint8),
        "Größe": torch.ones(1),
        "unsigned": torch.tensor([1, 2], dtype=torch.uint16),
    }  # fmt: skip
    path = tmp_path / "a.pth"
    torch.save({"model": given, "epoch": 3, "notes": ["x", (1, 2.5, None)], "device": torch.device("cpu")}, path,
               pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)  # fmt: skip
    found = read_checkpoint(path)
    assert found.wrapper == "model"
    assert list(found.tensors) == list(given)
    for key, value in given.items():
        assert found.tensors[key].dtype == value.dtype
        assert torch.equal(found.tensors[key], value), key


@pytest.mark.parametrize(
    ("shape", "stride", "offset", "count", "code"),
    [
        ((5,), (1,), 0, 4, "not_a_checkpoint"),
        ((4,), (1,), 1, 4, "not_a_checkpoint"),
        ((4,), (1,), PETA, 4, "not_a_checkpoint"),
        ((4,), (PETA,), 0, 4, "not_a_checkpoint"),
        ((4,), (1,), 0, PETA, "not_a_checkpoint"),
        ((4,), (1,), 0, 3, "not_a_checkpoint"),
        ((PETA,), (1,), 0, 4, "bad_checkpoint"),
        ((PETA,), (0,), 0, 4, "bad_checkpoint"),
        ((PETA, PETA, PETA), (1, 1, 1), 0, 4, "bad_checkpoint"),
        ((4,), (0,), 0, 4, "bad_checkpoint"),
        ((3, 2), (1, 1), 0, 4, "bad_checkpoint"),
        ((2, 2), (1, 1), 0, 4, "bad_checkpoint"),
        ((PETA, 0), (1, 1), 0, 4, "not_a_checkpoint"),
        ((1,) * 17, (1,) * 17, 0, 4, "not_a_checkpoint"),
        ((-1,), (1,), 0, 4, "not_a_checkpoint"),
        ((1 << 80,), (1,), 0, 4, "not_a_checkpoint"),
    ],
)
def test_declared_sizes_are_held_against_what_is_there(
    tmp_path: Path, shape: tuple[int, ...], stride: tuple[int, ...], offset: int, count: int, code: str
) -> None:
    window = tensor(shape, stride, count=count, offset=offset)
    assert refused(archive(tmp_path / "a.pth", state(w=window), DATA)) == code


def test_many_tensors_in_one_storage_are_bounded_by_the_file(tmp_path: Path) -> None:
    data = {"0": bytes(4 << 20)}
    window = tensor((1 << 20,), (1,), count=1 << 20)
    twice = archive(tmp_path / "twice.pth", state(a=window, b=window), data)
    assert read_checkpoint(twice).parameters == 2 << 20
    often = archive(tmp_path / "often.pth", dictionary(*((f"t{i}", window) for i in range(1000))), data)
    assert refused(often) == "bad_checkpoint"


def test_values_that_are_not_aligned_are_copied(tmp_path: Path) -> None:
    for shift in range(4):
        path = tmp_path / f"{shift}.pth"
        with zipfile.ZipFile(path, "w") as target:
            target.writestr("a/" + "x" * shift, b"")
            target.writestr("a/data.pkl", START + state(w=tensor((4,), (1,), count=4)) + END)
            target.writestr("a/data/0", DATA["0"])
        found = read_checkpoint(path).tensors["w"]
        assert torch.equal(found, FOUR)
        assert found.data_ptr() % 4 == 0


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pth", state(w=tensor((1 << 26,), (1,), count=1 << 26)),
                   {"0": bytes(1 << 28)}, compression=zipfile.ZIP_DEFLATED)  # fmt: skip
    assert path.stat().st_size < 1 << 20
    assert refused(path) == "not_a_checkpoint"


def test_members_that_share_bytes_or_names_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pth", state(w=tensor((4,), (1,), count=4)), DATA)
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", directory + 4)
    third = data.index(b"PK\x01\x02", second + 4)
    data[third + 42 : third + 46] = data[second + 42 : second + 46]  # both members begin at one place
    path.write_bytes(data)
    assert refused(path) == "not_a_checkpoint"
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as target:
        target.writestr("a/data.pkl", START + state(w=tensor((4,), (1,), count=4)) + END)
        with pytest.warns(UserWarning, match="Duplicate"):
            target.writestr("a/data.pkl", START + state(w=tensor((4,), (1,), count=4)) + END)
    assert refused(tmp_path / "b.pth") == "not_a_checkpoint"


def test_keys_that_come_twice_are_refused(tmp_path: Path) -> None:
    window = tensor((4,), (1,), count=4)
    assert refused(archive(tmp_path / "a.pth", dictionary(("w", window), ("w", window)), DATA)) == "bad_checkpoint"
    entry = '"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
    header = f"{{{entry},{entry}}}".encode()
    assert refused(safetensors(tmp_path / "a.safetensors", header, DATA["0"])) == "not_a_checkpoint"


@pytest.mark.parametrize("key", ["a\nb", "\x1b[31mred", "\ud800", "x" * 600, "\u202eevil", "zero\x00"])
def test_keys_that_logs_would_obey_are_refused(tmp_path: Path, key: str) -> None:
    assert (
        refused(archive(tmp_path / "a.pth", dictionary((key, tensor((4,), (1,), count=4))), DATA)) == "bad_checkpoint"
    )


def test_unicode_keys_are_read(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pth", state(Ünï重み=tensor((4,), (1,), count=4)), DATA)
    assert list(read_checkpoint(path).tensors) == ["Ünï重み"]


DEPTH = 200_000


@pytest.mark.parametrize(
    "content",
    [
        b"]" * DEPTH + b"a" * (DEPTH - 1),
        b")" + b"\x85" * DEPTH,
        state(model=b")" + b"\x85" * DEPTH),
        b"}" + b")" + b"\x85" * DEPTH + b"Ns",
        b"]q\x00h\x00a",
        b"}q\x00" + text("model") + b"h\x00s",
        b"]" + b"q\x00h\x00h\x00\x86" * 10_000,
        MAX_INSTRUCTIONS * b"N",
        b"\x8b\xff\xff\xff\x7f",
        b"X\xff\xff\xff\x7f",
        b"\x8e" + b"\xff" * 7 + b"\x7f",
        b"\x8d" + b"\xff" * 7 + b"\x7f",
        b"Nr\xff\xff\xff\xff",
        b"I" + b"9" * 100_000 + b"\n",
    ],
    ids=lambda content: f"{content[:6]!r}-{len(content)}",
)
def test_pickles_that_are_deep_long_or_lie_of_lengths(tmp_path: Path, content: bytes) -> None:
    assert refused(archive(tmp_path / "a.pth", content)) in ("bad_checkpoint", "not_a_checkpoint", "empty_checkpoint")


@pytest.mark.parametrize(
    "content",
    [
        called(name("builtins", "eval"), text("1")),
        called(name("builtins", "bytearray"), number(1 << 40)) + b"0" + called(name("os", "system"), text("true")),
        name("torch", "load"),
        name("torch._utils", "_import_dotted_name"),
        name("torch.hub", "load"),
        text("os") + text("system") + b"\x93",
        b"(ios\nsystem\n",
        name("torch", "FloatStorage") + tuple_of(number(1 << 40)) + b"R",
        name("collections", "OrderedDict") + b")\x81",
        b"\x82\x01",
        b"P1\n",
        name("collections", "OrderedDict") + b"}b",
    ],
)
def test_pickles_that_ask_for_more_than_tensors(tmp_path: Path, content: bytes) -> None:
    assert refused(archive(tmp_path / "a.pth", content)) == "unsafe_checkpoint"


def test_a_bytearray_of_a_terabyte_is_not_made(tmp_path: Path) -> None:
    content = dictionary(("x", called(name("builtins", "bytearray"), number(1 << 40))))
    assert refused(archive(tmp_path / "a.pth", content)) == "bad_checkpoint"


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantised"),
        (
            lambda: torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8),
            "quantised",
        ),
        (lambda: torch.ones(3, device="meta"), "meta"),
        (lambda: torch.ones(3, dtype=torch.complex64), "complex"),
        (lambda: torch.ones(3).to(torch.float8_e4m3fn), "float8"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # sparse CSR and quantised tensors announce what they are
def test_other_sorts_of_tensors_are_refused_by_name(
    tmp_path: Path, value: Callable[[], torch.Tensor], word: str
) -> None:
    torch.save({"fine": torch.ones(1), "odd": value()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=rf"'odd'.*{word}"):
        read_checkpoint(tmp_path / "a.pth")


def test_a_storage_of_another_type_than_its_bytes(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pth", state(w=tensor((4,), (1,), count=4, kind="DoubleStorage")), DATA)
    assert refused(path) == "not_a_checkpoint"
    assert refused(archive(tmp_path / "b.pth", state(w=storage("0", 4)), DATA)) == "bad_checkpoint"
    odd = called(name("torch._utils", "_rebuild_tensor_v2"), NONE, number(0), b")", b")", FALSE, NONE)
    assert refused(archive(tmp_path / "c.pth", state(w=odd), DATA)) == "not_a_checkpoint"


@pytest.mark.parametrize(
    "header",
    [
        b"{" + b"[" * 100_000,
        {"w": {"dtype": "F32", "shape": [PETA], "data_offsets": [0, 4 * PETA]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}},
        {"w": {"dtype": "F32", "shape": [1 << 63, 2], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
         "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {"w": {"dtype": "Q4", "shape": [4], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,1' + b"0" * 5000 + b"]}}",
        b'{"\\ud800":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        b"{\xff\xfe}",
    ],
    ids=range(12),
)  # fmt: skip
def test_safetensors_headers_that_lie(tmp_path: Path, header: object) -> None:
    assert refused(safetensors(tmp_path / "a.safetensors", header, DATA["0"])) == "not_a_checkpoint"


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_files_cut_at_every_block_are_refused(tmp_path: Path, form: str) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    weights = official_sam().state_dict()
    if form == "safetensors":
        save_file(weights, whole)
    else:
        torch.save(weights, whole, _use_new_zipfile_serialization=form == "zip")
    data = whole.read_bytes()
    for end in range(1024, len(data), 1024):
        cut.write_bytes(data[:end])
        assert refused(cut) == "not_a_checkpoint", end
    cut.write_bytes(data + bytes(1024))
    if form != "zip":  # what follows an archive's end may be its comment
        assert refused(cut) == "not_a_checkpoint"


def test_memory_is_bounded_by_the_size_of_the_file(tmp_path: Path) -> None:
    """The worst files that are known, in a process of their own."""
    paths = [
        archive(tmp_path / "dicts.pth", (MAX_INSTRUCTIONS - 10) * b"}"),
        archive(tmp_path / "strings.pth", (MAX_INSTRUCTIONS - 10) // 2 * b"X\x01\x00\x00\x00aq\x01"),
        archive(tmp_path / "sets.pth", (MAX_INSTRUCTIONS - 10) * b"\x8f"),
        archive(tmp_path / "memo.pth", b"N" + b"\x94" * 900_000),
        archive(tmp_path / "keys.pth", dictionary(*((f"t{i}", NONE) for i in range(300_000)))),
        safetensors(tmp_path / "header.safetensors", b"{" + b" " * 99_999_998 + b"}"),
        *(
            safetensors(
                tmp_path / f"values{i}.safetensors",
                b'{"__metadata__":[' + unit * ((MAX_HEADER_BYTES - 30) // len(unit)) + b"0]}",
            )
            for i, unit in enumerate((b"[" * 90 + b"]" * 90 + b",", b"[],", b"[1],", b'{"":0},', b'"\\u0100",'))
        ),
        safetensors(
            tmp_path / "tensors.safetensors",
            b"{"
            + b",".join(
                b'"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(MAX_HEADER_BYTES // 60)
            )
            + b"}",
        ),
        archive(tmp_path / "declared.pth", state(w=tensor((4,), (1,), count=PETA)), DATA),
        archive(tmp_path / "sparse.pth", state(w=tensor((4,), (1,), count=PETA)), DATA),
        tmp_path / "members.pth",
    ]
    with (tmp_path / "sparse.pth").open("r+b") as file:
        file.truncate(1 << 36)  # 64 GB that take no room
    pairs = b"](" + b"".join(text(f"k{i}") + NONE + b"\x86" for i in range(1000)) + b"e"
    dictionaries = name("collections", "OrderedDict") + b"q\x01" + pairs + b"\x85q\x02" + b"h\x01h\x02R" * 20_000
    paths.append(archive(tmp_path / "pairs.pth", dictionaries))
    paths.append(lying_zip64(tmp_path / "directory.pth", directory=3 << 30))
    with zipfile.ZipFile(tmp_path / "members.pth", "w") as target:
        for i in range(60_000):
            target.writestr(f"a/{i}", b"")
    script = """
import gc, sys
from pathlib import Path
from hypersam.checkpoint import read_checkpoint
from hypersam.errors import CheckpointError
def figure(name):
    return next(int(l.split()[1]) << 10 for l in Path("/proc/self/status").read_text().splitlines() if name in l)
for path in sys.argv[1:]:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = figure("VmRSS")
    try:
        read_checkpoint(path)
        code = "read"
    except CheckpointError as error:
        code = error.code
    print(figure("VmHWM") - before, code)
"""
    run = subprocess.run(
        [sys.executable, "-c", script, *map(str, paths)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    for path, line in zip(paths, run.stdout.splitlines(), strict=True):
        used, code = line.split()
        print(path.name, path.stat().st_size, int(used) >> 20, "MiB", code)
        assert code in ("not_a_checkpoint", "bad_checkpoint") or path.name == "tensors.safetensors", path.name
        assert int(used) <= MEMORY_FACTOR * min(path.stat().st_size, 1 << 30) + MEMORY_FLOOR, path.name


def test_an_archive_whose_list_of_members_is_a_bomb(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pth", state(w=tensor((4,), (1,), count=4)), DATA)
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\x05\x06")
    data[end + 12 : end + 16] = struct.pack("<I", 1 << 30)
    path.write_bytes(data)
    assert refused(path) == "not_a_checkpoint"


def lying_zip64(path: Path, *, directory: int, locator: int = 0, disks: int = 1) -> Path:
    """A sparse file whose zip64 record tells of a list of members of ``directory`` bytes, while its locator points
    elsewhere: some readers go where it points, Python's goes to the record before it."""
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.seek(directory)
        file.write(b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1, 1, directory, 0))
        file.write(b"PK\x06\x07" + struct.pack("<IQI", 0, locator, disks))
        file.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    return path


@pytest.mark.parametrize("locator", [0, 1 << 62, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("disks", [1, 9])
def test_zip64_records_that_lie(tmp_path: Path, locator: int, disks: int) -> None:
    path = lying_zip64(tmp_path / "a.pth", directory=1 << 20, locator=locator, disks=disks)
    assert refused(path) == "not_a_checkpoint"


def test_a_torchscript_program_is_called_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:  # the layout of torch.jit.save
        target.writestr("a/data.pkl", START + name("__torch__", "Net") + b")\x81" + END)
        target.writestr("a/code/__torch__.py", "class Net(Module):\n" * 100)
        target.writestr("a/constants.pkl", START + b")" + END)
    with pytest.raises(CheckpointError, match=r"is a TorchScript program.*state_dict"):
        read_checkpoint(path)


def long_number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<i", len(data)) + data


def test_numbers_that_hash_alike_are_refused(tmp_path: Path) -> None:
    """Python's hash of a whole number is its remainder by 2^61 - 1: a dictionary of such takes the square of its
    length in time. They come as keys, and as the numbers under which a pickle remembers a value."""
    alike = [k * ((1 << 61) - 1) for k in range(1, 150_000)]
    keys = b"}(" + b"".join(long_number(value) + NONE for value in alike) + b"u"
    assert refused(archive(tmp_path / "keys.pth", keys)) == "bad_checkpoint"
    memo = NONE + b"".join(b"p%d\n" % value for value in alike)
    assert refused(archive(tmp_path / "memo.pth", memo)) == "not_a_checkpoint"


@pytest.mark.parametrize("bits", [64, 100_000])
def test_keys_that_are_very_long_numbers(tmp_path: Path, bits: int) -> None:
    content = b"}" + long_number(1 << bits) + tensor((4,), (1,), count=4) + b"s"
    assert refused(archive(tmp_path / "a.pth", content, DATA)) == "bad_checkpoint"


def test_nothing_is_run(tmp_path: Path) -> None:
    """Every way in which a pickle can call, and what it would call."""
    ran = tmp_path / "ran"
    command = f"touch {ran}"
    ways = [
        name("os", "system") + tuple_of(text(command)) + b"R",
        b"(" + text(command) + b"ios\nsystem\n",
        b"(" + name("os", "system") + text(command) + b"o",
        text("os") + text("system") + b"\x93" + tuple_of(text(command)) + b"R",
        name("os", "system") + tuple_of(text(command)) + b"\x81",
        name("os", "system") + tuple_of(text(command)) + b"}\x92",
    ]
    for way in ways:
        assert refused(archive(tmp_path / "a.pth", dictionary(("model", way)))) == "unsafe_checkpoint"
        assert not ran.exists()
    pickle.loads(START + ways[0] + END)  # they are live ones
    assert ran.exists()
    os.remove(ran)
