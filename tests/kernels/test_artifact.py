"""The file format: what is written comes back, and what is damaged says so."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.artifact import open_artifact, write
from kernels.codec import BirkhoffConfig, BirkhoffTensor, Encoded, RawTensor, decode, encode
from kernels.errors import ArtifactCorrupt, ArtifactError, ArtifactVersion
from tests.memory import peak_bytes

HEADER: dict[str, Any] = {
    "codec": {"name": "birkhoff", "version": "1", "options": {"side": 0.1}},
    "model": {"family": "sam", "Größe": 3},
    "source": {"sha256": "0" * 64, "bytes": 12},
    "report": {"ratio": 4.7},
}


def tensors() -> dict[str, Encoded]:
    torch.manual_seed(1)
    config = BirkhoffConfig()
    coded = {
        "a.weight": encode(torch.randn(33, 21) * 0.02, config, by_row=True),
        "b.weight": encode((torch.randn(8, 3, 4, 4) * 0.02).half(), config, by_row=False),
        "c.weight": encode((torch.randn(7, 10) * 0.02).bfloat16(), config, by_row=True),
        "collapsed": encode(torch.full((12, 2), 1e8), config, by_row=True),
    }
    assert all(isinstance(each, BirkhoffTensor) for each in coded.values())
    raw = {
        "bias": torch.randn(5),
        "half": torch.randn(3).half(),
        "brain": torch.randn(3, 1).bfloat16(),
        "double": torch.randn(2, dtype=torch.float64),
        "scalar": torch.tensor(3.5),
        "counter": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 4),
        "strided": torch.arange(6.0).view(2, 3).t(),
    }
    return {**coded, **{name: RawTensor(tensor) for name, tensor in raw.items()}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "model.hsam"
    write(target, tensors(), **HEADER)
    return target


def rewrite(path: Path, change: Any, *, keep_checksum: bool = False) -> None:
    """Apply ``change(metadata, header)`` to a file's header, with a fitting header checksum unless told."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8 : 8 + length])
    metadata = entries["__metadata__"]
    header = json.loads(zlib.decompress(base64.b64decode(metadata["header"])))
    change(metadata, header)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    metadata["header"] = base64.b64encode(zlib.compress(text)).decode()
    if not keep_checksum:
        metadata["header_sha256"] = hashlib.sha256(text).hexdigest()
    prefix = json.dumps(entries).encode()
    prefix += b" " * (-len(prefix) % 8)
    path.write_bytes(struct.pack("<Q", len(prefix)) + prefix + data[8 + length :])


def damage(path: Path, name: str) -> None:
    """Flip one bit in the middle of a tensor's stream."""
    data = bytearray(path.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    start, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    data[8 + length + (start + end) // 2] ^= 16
    path.write_bytes(data)


def test_round_trip(path: Path) -> None:
    given = tensors()
    with open_artifact(path) as opened:
        assert opened.names() == tuple(sorted(given))
        for key, value in HEADER.items():
            assert getattr(opened, key) == value
        state = opened.state_dict()
        for name, encoded in given.items():
            expected = decode(encoded)
            assert state[name].dtype == expected.dtype
            assert state[name].shape == expected.shape
            assert torch.equal(state[name], expected)
            stored = opened.encoded(name)
            if isinstance(encoded, BirkhoffTensor):
                assert isinstance(stored, BirkhoffTensor)
                for field in vars(encoded):
                    if field != "indices":
                        assert getattr(stored, field) == getattr(encoded, field)
        with pytest.raises(KeyError):
            opened.encoded("nothing")
    assert list(path.parent.iterdir()) == [path]


def test_is_an_ordinary_safetensors_file(path: Path) -> None:
    loaded = load_file(path)
    assert set(loaded) == set(tensors())
    assert loaded["a.weight"].dtype == torch.uint8
    assert loaded["strided"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_same_bytes_every_time(path: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.hsam"
    backwards = dict(reversed(tensors().items()))
    write(again, backwards, **{key: dict(reversed(value.items())) for key, value in HEADER.items()})
    assert again.read_bytes() == path.read_bytes()


def test_tensors_outlive_the_file(path: Path) -> None:
    with open_artifact(path) as opened:
        state, stored = opened.state_dict(), opened.encoded("bias")
    path.unlink()
    assert isinstance(stored, RawTensor)
    assert torch.equal(stored.tensor, state["bias"])


@pytest.mark.parametrize("name", ["a.weight", "bias", "counter"])
def test_a_flipped_bit_names_the_tensor(path: Path, name: str) -> None:
    damage(path, name)
    with pytest.raises(ArtifactCorrupt, match=f"{name}: the checksum"):
        open_artifact(path)
    with open_artifact(path, verify=False) as opened:
        opened.encoded("b.weight")
        with pytest.raises(ArtifactCorrupt, match=name):
            opened.encoded(name)
        with pytest.raises(ArtifactCorrupt, match=name):
            opened.state_dict()


def test_opening_without_verifying_reads_the_header_alone(tmp_path: Path) -> None:
    """A sparse file of 4 GiB opens in no memory."""
    target = tmp_path / "large.hsam"
    write(target, {"x": RawTensor(torch.zeros(4, dtype=torch.uint8))}, **HEADER)
    data = target.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8 : 8 + length])
    size = 1 << 32
    entries["x"] |= {"shape": [size], "data_offsets": [0, size]}
    text = json.dumps(entries).encode()
    with target.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    before = "from kernels.artifact import open_artifact"
    assert peak_bytes(before, "open_artifact(Path(sys.argv[1]), verify=False)", str(target)) < 50 << 20


def test_not_an_artifact(tmp_path: Path) -> None:
    target = tmp_path / "other"
    for content in (b"", b"abc", b"PK\x03\x04" + bytes(100), b"\x10" + bytes(7) + b"{" + b"x" * 50):
        target.write_bytes(content)
        with pytest.raises(ArtifactError, match="no safetensors file") as caught:
            open_artifact(target)
        assert caught.value.code == "bad_artifact"
    save_file({"w": torch.zeros(3)}, target)
    with pytest.raises(ArtifactError, match="no compressed model"):
        open_artifact(target)
    with pytest.raises(FileNotFoundError):
        open_artifact(tmp_path / "missing")


@pytest.mark.parametrize("keep", [20, 300, -1, -200])
def test_cut_off(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactCorrupt, match="cut off") as caught:
        open_artifact(path, verify=False)
    assert caught.value.code == "artifact_corrupt"


def test_appended_to(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ArtifactCorrupt, match="appended"):
        open_artifact(path)


def test_other_version(path: Path) -> None:
    rewrite(path, lambda metadata, header: metadata.update(format_version="2"))
    with pytest.raises(ArtifactVersion, match=r"version 2.*reads version 1") as caught:
        open_artifact(path)
    assert caught.value.code == "artifact_version"


def test_changed_header(path: Path) -> None:
    rewrite(path, lambda metadata, header: header["report"].update(ratio=9.9), keep_checksum=True)
    with pytest.raises(ArtifactCorrupt, match="checksum of the header"):
        open_artifact(path)


def record(header: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in header["tensors"] if each["name"] == name)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("a.weight", {"shape": [33, 20000]}, "a.weight: .* take"),
        ("a.weight", {"shape": [-1, 21]}, "shape of a.weight"),
        ("a.weight", {"shape": [33, 21, 1]}, "a.weight: coding by row"),
        ("a.weight", {"bits": 11}, "a.weight: .* take"),
        ("a.weight", {"bits": 99}, "a.weight: bits"),
        ("a.weight", {"nodes": 1226}, "a.weight: nodes"),
        ("a.weight", {"nodes": 1e3}, "a.weight: .*whole"),
        ("a.weight", {"centre": [0.0]}, "a.weight"),
        ("a.weight", {"centre": ["x", 0.0]}, "a.weight"),
        ("a.weight", {"side": 0.0}, "a.weight: side"),
        ("a.weight", {"dtype": "I64"}, "a.weight: the dtype"),
        ("a.weight", {"dtype": "F99"}, "F99"),
        ("a.weight", {"name": "z.weight"}, "'a.weight' is not in the header"),
        ("a.weight", {"name": "bias"}, "twice"),
        ("bias", {"shape": [6]}, "bias: .*another shape"),
        ("bias", {"encoding": "birkhoff"}, "bias"),
    ],
)
def test_header_that_does_not_fit_its_streams(path: Path, name: str, change: dict[str, Any], message: str) -> None:
    rewrite(path, lambda metadata, header: record(header, name).update(change))
    with pytest.raises(ArtifactCorrupt, match=message):
        open_artifact(path)


def test_header_without_a_part(path: Path) -> None:
    rewrite(path, lambda metadata, header: header.pop("model"))
    with pytest.raises(ArtifactCorrupt, match="model"):
        open_artifact(path)


def test_stream_missing(path: Path) -> None:
    rewrite(path, lambda metadata, header: header["tensors"].append({**record(header, "bias"), "name": "more"}))
    with pytest.raises(ArtifactCorrupt, match="'more' has no stream"):
        open_artifact(path)


def test_unknown_encoding(path: Path) -> None:
    rewrite(path, lambda metadata, header: record(header, "bias").update(encoding="spiral"))
    with pytest.raises(ArtifactVersion, match=r"bias.*spiral"):
        open_artifact(path)


def test_index_that_names_no_pair(path: Path) -> None:
    rewrite(path, lambda metadata, header: record(header, "a.weight").update(nodes=64))
    with open_artifact(path) as opened, pytest.raises(ArtifactCorrupt, match=r"a\.weight: index"):
        opened.state_dict()


def test_what_cannot_be_written(tmp_path: Path) -> None:
    target = tmp_path / "x.hsam"
    with pytest.raises(ArtifactError, match="complex64"):
        write(target, {"c": RawTensor(torch.zeros(2, dtype=torch.complex64))}, **HEADER)
    with pytest.raises(ArtifactError, match="named"):
        write(target, {"__metadata__": RawTensor(torch.zeros(2))}, **HEADER)
    with pytest.raises(ArtifactError, match="JSON"):
        write(target, {}, **{**HEADER, "report": {"ratio": float("nan")}})
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kernels.artifact.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(path, {}, **HEADER)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
