"""From a checkpoint to an artifact and back, and to a model that holds no dense weight."""

from __future__ import annotations

import gc
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import hypersam
from hypersam import compression
from hypersam.errors import (
    ArtifactCorrupt,
    ArtifactError,
    CheckpointError,
    InvalidOption,
    JobCancelled,
    TargetUnreachable,
)
from hypersam.loading import is_artifact
from hypersam.options import check_options
from hypersam.reports import CompressReport, describe_artifact
from kernels.artifact import open_artifact
from kernels.codec import BirkhoffConfig, BirkhoffTensor, decode, encode
from kernels.hyperlinear import HyperLinear
from tests.models import TINY, ModelSize, official_sam, save_checkpoint

WIDE = ModelSize(image=64, patch=8, dim=192, depth=4, heads=4, window=4, global_blocks=(1, 3), prompt_dim=128)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, CompressReport]:
    folder = tmp_path_factory.mktemp("made")
    source = save_checkpoint(folder / "tiny.pth")
    target = folder / "tiny.hsam"
    return source, target, hypersam.compress(source, target, codec="birkhoff")


def test_the_report_is_what_can_be_measured(made: tuple[Path, Path, CompressReport]) -> None:
    source, target, report = made
    assert report.source_sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert report.artifact_sha256 == hashlib.sha256(target.read_bytes()).hexdigest()
    assert report.ratio == source.stat().st_size / target.stat().st_size
    original = torch.load(source, weights_only=True)
    with open_artifact(target) as artifact:
        restored = artifact.state_dict()
        coded = [n for n in artifact.names() if isinstance(artifact.encoded(n), BirkhoffTensor)]
    signal = sum(float(original[n].double().square().sum()) for n in coded)
    error = sum(float((original[n].double() - restored[n].double()).square().sum()) for n in coded)
    assert report.sqnr_db == pytest.approx(10 * np.log10(signal / error), abs=1e-6)
    assert report.parameters == sum(t.numel() for t in original.values())
    assert report.bits_per_weight is not None
    streams = sum(t.bits_per_weight * np.prod(t.shape) for t in report.tensors if t.encoding != "raw")
    assert report.bits_per_weight > streams / sum(original[n].numel() for n in coded)
    json.dumps(report.as_dict())


def test_the_artifact_restores_what_the_encoder_said(made: tuple[Path, Path, CompressReport]) -> None:
    source, target, _ = made
    sam = official_sam()
    linear = {f"{n}.weight" for n, m in sam.named_modules() if isinstance(m, nn.Linear)}
    buffers = {n for n, _ in sam.named_buffers()}
    original = torch.load(source, weights_only=True)
    with open_artifact(target) as artifact:
        restored = artifact.state_dict()
    assert restored.keys() == original.keys()
    for name, weight in original.items():
        expected = decode(encode(weight, BirkhoffConfig(), by_row=name in linear, keep_raw=name in buffers))
        assert restored[name].dtype == weight.dtype
        assert torch.equal(restored[name], expected), name


def test_the_same_input_gives_the_same_bytes(made: tuple[Path, Path, CompressReport], tmp_path: Path) -> None:
    source, target, _ = made
    hypersam.compress(source, tmp_path / "again.hsam", codec="birkhoff")
    assert (tmp_path / "again.hsam").read_bytes() == target.read_bytes()


def test_the_loaded_model_holds_no_dense_linear_weight(tmp_path: Path) -> None:
    """After loading and after answering, no floating tensor alive anywhere is as large as a linear weight."""
    wide = ModelSize(image=64, patch=8, dim=96, depth=2, heads=2, window=4, global_blocks=(1,), prompt_dim=32)
    official = official_sam(wide)
    linears = [m for m in official.image_encoder.modules() if isinstance(m, nn.Linear)]
    count, dense_bytes = len(linears), sum(m.weight.nbytes for m in linears)
    # The square ones are no larger than the patch embedding, which is held dense.
    smallest = min(m.weight.nbytes for m in linears if m.in_features != m.out_features)
    torch.save(official.state_dict(), tmp_path / "wide.pth")
    hypersam.compress(tmp_path / "wide.pth", tmp_path / "wide.hsam", codec="birkhoff", options={"fidelity": False})
    del official, linears
    gc.collect()
    before = {id(t) for t in gc.get_objects() if issubclass(type(t), torch.Tensor)}

    def large() -> list[tuple[int, ...]]:
        gc.collect()
        fresh = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and id(t) not in before]
        return [tuple(t.shape) for t in fresh if t.is_floating_point() and t.untyped_storage().nbytes() >= smallest]

    predictor = hypersam.load(tmp_path / "wide.hsam")
    assert large() == []
    predictor.set_image(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    predictor.predict(box=np.array([5, 5, 40, 40]))
    assert large() == []
    encoder = predictor.model.network.image_encoder
    layers = [m for m in encoder.modules() if isinstance(m, HyperLinear)]
    assert len(layers) == count
    assert not [m for m in encoder.modules() if isinstance(m, nn.Linear)]
    indices = sum(layer.indices.nbytes for layer in layers)
    assert indices == dense_bytes / 4  # an int16 for two fp32 weights
    tables = sum(layer.resident_bytes() for layer in layers) - indices
    assert tables < count * 8 * 4 * 1600 + 8 * dense_bytes / wide.dim  # (K + 1)·U pairs a layer, and biases


def test_sensitivities_of_an_earlier_report_are_as_good_as_measured_ones(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "a.pth")
    first = hypersam.compress(source, tmp_path / "a.hsam", options={"fidelity": False})
    known = {t.name: t.sensitivity for t in first.tensors if t.sensitivity is not None}
    second = hypersam.compress(source, tmp_path / "b.hsam", options={"fidelity": False}, sensitivities=known)
    assert second.artifact_sha256 == first.artifact_sha256
    assert "measuring" in first.stage_seconds
    assert "measuring" not in second.stage_seconds


def test_masks_from_compressed_weights_are_those_of_the_decoded_ones(
    made: tuple[Path, Path, CompressReport], tmp_path: Path
) -> None:
    _, target, _ = made
    with open_artifact(target) as artifact:
        torch.save(artifact.state_dict(), tmp_path / "decoded.pth")
    compressed, dense = hypersam.load(target), hypersam.load(tmp_path / "decoded.pth")
    image = np.random.default_rng(1).integers(0, 256, (70, 40, 3), dtype=np.uint8)
    for predictor in (compressed, dense):
        predictor.set_image(image)
    a = compressed.get_image_embedding()
    b = dense.get_image_embedding()
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    point = {"point_coords": np.array([[20, 30]]), "point_labels": np.array([1])}
    x = compressed.predict(**point, return_logits=True)
    y = dense.predict(**point, return_logits=True)
    for got, want in zip(x, y, strict=True):
        assert np.abs(got - want).max() < 1e-3 * np.abs(want).max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {k: v.to(dtype) for k, v in official_sam().state_dict().items()}
    torch.save({"model": state}, tmp_path / "half.pth")
    hypersam.compress(tmp_path / "half.pth", tmp_path / "half.hsam")
    with open_artifact(tmp_path / "half.hsam") as artifact:
        assert {t.dtype for t in artifact.state_dict().values()} == {dtype}
    hypersam.load(tmp_path / "half.hsam").set_image(np.zeros((20, 30, 3), np.uint8))


def test_progress_counts_up_to_all_bytes(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "a.pth")
    told: list[compression.Progress] = []
    hypersam.compress(source, tmp_path / "a.hsam", progress=told.append)
    stages = list(dict.fromkeys(p.stage for p in told))
    assert stages == ["reading", "measuring", "planning", "encoding", "comparing", "writing", "verifying"]
    encoding = [p for p in told if p.stage == "encoding"]
    assert encoding[-1].done == encoding[-1].total
    assert [p.done for p in encoding] == sorted(p.done for p in encoding)
    assert len({p.done for p in encoding}) > 50


@pytest.mark.parametrize("stage", ["reading", "measuring", "planning", "encoding", "comparing", "writing", "verifying"])
def test_stopping_leaves_nothing_behind(tmp_path: Path, stage: str) -> None:
    source = save_checkpoint(tmp_path / "a.pth")

    def stop(progress: compression.Progress) -> None:
        if progress.stage == stage:
            raise JobCancelled("stop")

    with pytest.raises(JobCancelled):
        hypersam.compress(source, tmp_path / "a.hsam", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]
    (tmp_path / "a.hsam").write_bytes(b"an earlier one")
    with pytest.raises(JobCancelled):
        hypersam.compress(source, tmp_path / "a.hsam", progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.hsam", "a.pth"]
    assert (tmp_path / "a.hsam").read_bytes() == b"an earlier one"


def test_a_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "a.pth")
    before = source.read_bytes()
    with pytest.raises(InvalidOption, match="another name"):
        hypersam.compress(source, tmp_path / "." / "a.pth")
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("codec", "options", "named"),
    [
        ("jpeg", {}, "birkhoff"),
        ("birkhoff", {"sides": 1}, "side"),
        ("birkhoff", {"side": -1}, "side"),
        ("birkhoff", {"side": "wide"}, "side"),
        ("birkhoff", {"nodes": [1000]}, "squares"),
        ("birkhoff", {"max_classes": 0}, "max_classes"),
        ("birkhoff", {"nodes": None}, "birkhoff"),
        ("birkhoff", {"nodes": [4] * 17}, "at most"),
        ("birkhoff", {"side": 10**400}, "birkhoff"),
    ],
)
def test_unknown_codecs_and_options_are_refused(codec: str, options: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidOption, match=named):
        check_options(codec, options)


def test_an_artifact_is_no_checkpoint(made: tuple[Path, Path, CompressReport], tmp_path: Path) -> None:
    _, target, _ = made
    assert is_artifact(target)
    with pytest.raises(InvalidOption, match="already"):
        hypersam.compress(target, tmp_path / "b.hsam")


def test_damage_anywhere_is_found_at_load(made: tuple[Path, Path, CompressReport], tmp_path: Path) -> None:
    _, target, _ = made
    data = bytearray(target.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    broken = tmp_path / "broken.hsam"
    rng = np.random.default_rng(0)
    for position in [*rng.integers(header, len(data), 25), header, len(data) - 1]:
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(rng.integers(8))
        broken.write_bytes(flipped)
        with pytest.raises(ArtifactCorrupt, match=r"image_encoder|prompt_encoder|mask_decoder"):
            hypersam.load(broken)
    for position in rng.integers(8, header, 40):
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(rng.integers(8))
        broken.write_bytes(flipped)
        with pytest.raises((ArtifactError, CheckpointError)):
            hypersam.load(broken)


def test_the_description_agrees_with_the_report(made: tuple[Path, Path, CompressReport]) -> None:
    _, target, report = made
    found = describe_artifact(target)
    for name in (
        "variant",
        "codec",
        "ratio",
        "fp32_ratio",
        "fidelity",
        "bits_per_weight",
        "parameters",
        "encoded_share",
    ):
        assert found[name] == getattr(report, name)
    assert found["sqnr_db"] == pytest.approx(report.sqnr_db, rel=1e-3)
    assert found["source"]["sha256"] == report.source_sha256
    assert found["sha256"] == report.artifact_sha256
    assert TINY.image == found["config"]["image_size"]


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("lattice", {"preset": "4x"}),
        ("lattice", {"target_ratio": 5.7, "policy": "equal_error"}),
        ("lattice", {"target_ratio": 10, "policy": "equal_bits"}),
        ("lattice", {"target_ratio": 2.5}),
        ("orbit", {"preset": "6.5x"}),
        ("orbit", {"target_ratio": 9.0}),
        ("lattice", {"target_mb": 2.2}),
    ],
)
def test_the_size_is_what_was_asked_for(tmp_path: Path, codec: str, options: dict[str, object]) -> None:
    """The whole file, everything counted: within one per cent, and never above."""
    source = save_checkpoint(tmp_path / "a.pth", WIDE)
    report = hypersam.compress(source, tmp_path / "a.hsam", codec=codec, options=options)
    original = torch.load(source, weights_only=True)
    size, full = (tmp_path / "a.hsam").stat().st_size, sum(4 * t.numel() for t in original.values())
    assert (size, full) == (report.artifact_bytes, report.fp32_bytes)
    ratio = {"4x": 4.0, "6.5x": 6.5}.get(str(options.get("preset")), options.get("target_ratio"))
    budget = 1e6 * float(str(options["target_mb"])) if ratio is None else full / float(str(ratio))
    assert 0.99 * budget <= size <= budget
    _check_artifact(tmp_path / "a.hsam", report, original)
    hypersam.load(tmp_path / "a.hsam").set_image(np.zeros((20, 30, 3), np.uint8))


def test_no_tensor_has_a_larger_error_than_asked_for(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "a.pth", WIDE)
    for codec, limit in (("lattice", 0.02), ("orbit", 0.1)):
        options = {"max_error": limit, "fidelity": False}
        report = hypersam.compress(source, tmp_path / "a.hsam", codec=codec, options=options)
        original = torch.load(source, weights_only=True)
        with open_artifact(tmp_path / "a.hsam") as artifact:
            for name, restored in artifact.state_dict().items():
                error = float((restored.double() - original[name].double()).norm())
                assert error <= limit * float(original[name].double().norm()), name
        assert report.fp32_ratio > (4 if codec == "lattice" else 5)
        assert report.fidelity is None


def test_a_size_that_cannot_be_reached(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "a.pth")
    with pytest.raises(TargetUnreachable, match="least"):
        hypersam.compress(source, tmp_path / "a.hsam", options={"target_mb": 0.001})
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_more_room_than_the_tensors_take(tmp_path: Path) -> None:
    """All are then kept as exactly as the codec can."""
    source = save_checkpoint(tmp_path / "tiny.pth")
    options = {"target_mb": 1, "policy": "equal_error", "fidelity": False}
    report = hypersam.compress(source, tmp_path / "a.hsam", options=options)
    assert report.artifact_bytes < 2 * source.stat().st_size
    assert report.sqnr_db is None or report.sqnr_db > 60


def test_a_plan_predicts_the_artifact(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "a.pth", WIDE)
    for codec, ratio in (("lattice", 6.0), ("orbit", 7.5)):
        options = {"target_ratio": ratio, "fidelity": False}
        planned = hypersam.plan(source, codec=codec, options=options)
        made = hypersam.compress(source, tmp_path / "a.hsam", codec=codec, options=options)
        assert planned.artifact_bytes == pytest.approx(made.artifact_bytes, rel=0.01)
        assert planned.sqnr_db == pytest.approx(made.sqnr_db, abs=0.5)
        assert [t.name for t in planned.tensors] == [t.name for t in made.tensors]


def test_what_cannot_be_coded_is_kept_as_it_is(tmp_path: Path) -> None:
    """NaN, infinity, zeros, subnormals and huge values among ordinary weights, and nothing else changes for it."""
    state = official_sam(WIDE).state_dict()
    keys = [k for k, v in state.items() if v.ndim == 2 and "blocks" in k and "rel_pos" not in k][:6]
    state[keys[0]][3, 4] = torch.nan
    state[keys[1]][0, 0] = torch.inf
    state[keys[2]].zero_()
    state[keys[3]].mul_(1e-42)
    state[keys[4]][1, 1] = 3e38
    state[keys[5]].fill_(0.25)
    torch.save(state, tmp_path / "odd.pth")
    for codec in ("lattice", "orbit"):
        options = {"target_ratio": 4.5, "policy": "equal_error", "fidelity": False}
        report = hypersam.compress(tmp_path / "odd.pth", tmp_path / "odd.hsam", codec=codec, options=options)
        kinds = {t.name: t.encoding for t in report.tensors}
        assert kinds[keys[0]] == kinds[keys[1]] == "raw"
        with open_artifact(tmp_path / "odd.hsam") as artifact:
            restored = artifact.state_dict()
        for key in keys[:2]:
            assert torch.equal(restored[key].nan_to_num(), state[key].nan_to_num())
        assert torch.equal(restored[keys[2]], state[keys[2]])
        for key in keys[3:]:
            error = (restored[key].double() - state[key].double()).norm() / state[key].double().norm()
            assert float(error) < 0.35, key


def _check_artifact(path: Path, report: CompressReport, original: dict[str, torch.Tensor]) -> None:
    """The report's figures are those of the file."""
    with open_artifact(path) as artifact:
        restored = artifact.state_dict()
    assert restored.keys() == original.keys()
    coded = [t for t in report.tensors if t.encoding != "raw"]
    signal = sum(float(original[t.name].double().square().sum()) for t in coded)
    error = sum(float((original[t.name].double() - restored[t.name].double()).square().sum()) for t in coded)
    assert report.sqnr_db == pytest.approx(10 * np.log10(signal / error), abs=1e-6)
    for tensor in coded:
        w = original[tensor.name].double()
        if tensor.relative_error is not None:
            norm = float((restored[tensor.name].double() - w).norm() / w.norm())
            assert tensor.relative_error == pytest.approx(norm, rel=1e-6)
