"""The command line, run as a user runs it: a process of its own, its exit code and what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import hypersam
from hypersam.cli.offline import run_decompress
from kernels.artifact import RawTensor, write
from tests.models import official_sam, save_checkpoint


def run(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "hypersam.cli", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def run_json(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
    """Standard output must be one JSON object and nothing else."""
    done = run(*arguments, "--json", code=code)
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_checkpoint(folder / "tiny.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    run("compress", folder / "tiny.pth", folder / "tiny.hsam", "--codec", "birkhoff", "--no-fidelity")
    return folder


def test_compress_tells_its_figures(folder: Path) -> None:
    found = run_json("compress", folder / "tiny.pth", folder / "lattice.hsam")
    for name in ("codec", "ratio", "bits_per_weight", "sqnr_db", "seconds", "source_sha256", "artifact_sha256"):
        assert found[name]
    assert found["codec"] == "lattice"
    assert found["ratio"] == (folder / "tiny.pth").stat().st_size / (folder / "lattice.hsam").stat().st_size
    assert 0.99 * found["fp32_bytes"] / 5 <= found["artifact_bytes"] <= found["fp32_bytes"] / 5
    assert found["fidelity"]["models"]["compressed"]["mask_iou"] > 0
    plot = folder / "report.svg"
    shown = run("inspect", folder / "lattice.hsam", "--report", "--plot", plot).stdout
    assert "int4" in shown
    assert plot.read_text().startswith("<?xml")
    told = run_json("inspect", folder / "lattice.hsam")
    assert told["fidelity"] == found["fidelity"]


def test_a_plan_writes_nothing(folder: Path) -> None:
    before = sorted(folder.iterdir())
    found = run_json("plan", folder / "tiny.pth", "--target-ratio", "6")
    assert sorted(folder.iterdir()) == before
    assert 0.98 < found["fp32_ratio"] / 6 < 1.02
    assert {t["encoding"] for t in found["tensors"]} >= {"lattice"}
    assert "tensor" in run("plan", folder / "tiny.pth", "--max-error", "0.05").stdout
    run_json("plan", folder / "tiny.pth", "--codec", "birkhoff", code=1)
    assert (
        run_json("plan", folder / "tiny.pth", "--target-mb", "0.001", code=1)["error"]["code"] == "target_unreachable"
    )


def test_options_reach_the_codec(folder: Path) -> None:
    found = run_json(
        "compress",
        folder / "tiny.pth",
        folder / "o.hsam",
        "--codec",
        "birkhoff",
        "--option",
        "side=0.2",
        "--option",
        "nodes=[3600]",
    )
    assert found["options"]["side"] == 0.2
    assert found["options"]["nodes"] == [3600]


def test_decompress_gives_every_key_back(folder: Path) -> None:
    run("decompress", folder / "tiny.hsam", folder / "back.safetensors")
    back, source = load_file(folder / "back.safetensors"), official_sam().state_dict()
    assert back.keys() == source.keys()
    for name, weight in source.items():
        assert back[name].shape == weight.shape
        assert back[name].dtype == weight.dtype
        assert float((back[name] - weight).norm()) <= 0.35 * float(weight.norm()), name
    run("compress", folder / "back.safetensors", folder / "twice.hsam")


@pytest.mark.parametrize("prefix", ["module.", "model._orig_mod."])
def test_decompress_names_tensors_as_the_source_did(tmp_path: Path, prefix: str) -> None:
    source = {prefix + key: weight for key, weight in official_sam().state_dict().items()}
    torch.save({"state_dict": source}, tmp_path / "a.pth")
    hypersam.compress(tmp_path / "a.pth", tmp_path / "a.hsam", codec="birkhoff", options={"fidelity": False})
    run_decompress(tmp_path / "a.hsam", tmp_path / "back.safetensors", as_json=True)
    back = load_file(tmp_path / "back.safetensors")
    assert {k: (t.shape, t.dtype) for k, t in back.items()} == {k: (t.shape, t.dtype) for k, t in source.items()}


@pytest.mark.parametrize("prefix", [None, 3, ["module."], "x" * 1_000_000, "a\nb."])
def test_decompress_gives_no_prefix_that_no_key_could_have(tmp_path: Path, prefix: object) -> None:
    write(
        tmp_path / "a.hsam", {"w": RawTensor(torch.zeros(2))}, codec={}, model={}, report={},
        source={"prefix": prefix},
    )  # fmt: skip
    run_decompress(tmp_path / "a.hsam", tmp_path / "back.safetensors", as_json=True)
    assert load_file(tmp_path / "back.safetensors").keys() == {"w"}


def test_inspect_takes_a_decoder(tmp_path: Path) -> None:
    state = official_sam().state_dict()
    encoder = {k: v for k, v in state.items() if k.startswith("image_encoder.")}
    torch.save(encoder, tmp_path / "encoder.pt")
    torch.save({k: v for k, v in state.items() if k not in encoder}, tmp_path / "decoder.pt")
    found = run_json("inspect", tmp_path / "encoder.pt", "--decoder", tmp_path / "decoder.pt")
    assert (found["family"], len(found["tensors"])) == ("sam_vit", len(state))
    assert "image encoder alone" in run("inspect", tmp_path / "encoder.pt", code=1).stderr
    missing = run("inspect", tmp_path / "encoder.pt", "--decoder", tmp_path / "none.pt", code=1)
    assert "there is no file" in missing.stderr


def test_inspect_tells_checkpoints_and_artifacts_apart(folder: Path) -> None:
    checkpoint = run_json("inspect", folder / "tiny.pth")
    artifact = run_json("inspect", folder / "tiny.hsam")
    assert (checkpoint["kind"], artifact["kind"]) == ("checkpoint", "artifact")
    for name in ("family", "variant", "candidates", "parameters", "config"):
        assert checkpoint[name] == artifact[name]
    assert artifact["ratio"] > 1
    assert artifact["sqnr_db"] > 10
    assert len(artifact["tensors"]) == len(checkpoint["tensors"]) == len(official_sam().state_dict())
    assert "tiny" not in run("inspect", folder / "tiny.hsam", "--tensors").stderr


def test_segment_writes_the_best_mask(folder: Path) -> None:
    out = folder / "mask.png"
    found = run_json("segment", folder / "tiny.hsam", folder / "a.png", "--point", "20,30", "--point", "60,5,0",
                     "--box", "5,5,50,40", "--out", out)  # fmt: skip
    mask = np.asarray(Image.open(out))
    assert mask.shape == (48, 64)
    assert set(np.unique(mask)) <= {0, 255}
    assert int((mask > 0).sum()) == found["masks"][0]["area"]
    scores = [m["score"] for m in found["masks"]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert (
        len(run_json("segment", folder / "tiny.pth", folder / "a.png", "--point", "2,3", "--no-multimask")["masks"])
        == 1
    )


def test_eval_compares_two_models(folder: Path) -> None:
    found = run_json("eval", folder / "tiny.hsam", "--objects", "12", "--against", folder / "tiny.pth")
    assert found["objects"] >= 12
    for kind in ("point", "box"):
        assert 0 <= found["miou"][kind]["mean"] <= 1
        assert 0.5 < found["agreement"][kind]["mean"] <= 1
        difference = found["miou"][kind]["mean"] - found["against"][kind]["mean"]
        assert found["difference"][kind]["mean"] == pytest.approx(difference, abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["compress", "none.pth", "x.hsam"], "not_a_checkpoint"),
        (["compress", "a.png", "x.hsam"], "not_a_checkpoint"),
        (["compress", "tiny.hsam", "x.hsam"], "invalid_option"),
        (["compress", "tiny.pth", "x.hsam", "--codec", "zip"], "invalid_option"),
        (["compress", "tiny.pth", "x.hsam", "--option", "side"], "invalid_option"),
        (["compress", "tiny.pth", "x.hsam", "--option", "side=-1"], "invalid_option"),
        (["compress", "tiny.pth", "x.hsam", "--variant", "sam_vit_b"], "variant_mismatch"),
        (["compress", "tiny.pth", "none/x.hsam"], "invalid_option"),
        (["compress", "tiny.pth", "tiny.pth"], "invalid_option"),
        (["compress", "tiny.pth", "x.hsam", "--device", "gpu"], "invalid_option"),
        (["segment", "tiny.hsam", "a.png", "--point", "1,2", "--device", "cuda:77"], "unavailable"),
        (["decompress", "tiny.pth", "x.safetensors"], "bad_artifact"),
        (["inspect", "none.pth"], "not_a_checkpoint"),
        (["segment", "tiny.hsam", "a.png"], "bad_prompt"),
        (["segment", "tiny.hsam", "a.png", "--point", "1"], "bad_prompt"),
        (["segment", "tiny.hsam", "a.png", "--point", "1,2,7"], "bad_prompt"),
        (["segment", "tiny.hsam", "a.png", "--point", "65,2"], "bad_prompt"),
        (["segment", "tiny.hsam", "tiny.pth", "--point", "1,2"], "bad_image"),
    ],
)
def test_mistakes_are_one_line_with_a_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], error: str
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(p.name for p in folder.iterdir())
    found = run_json(*arguments, code=1)
    assert found["error"]["code"] == error
    assert found["error"]["message"]
    assert sorted(p.name for p in folder.iterdir()) == before


def test_the_package_can_be_run_as_the_command_is() -> None:
    done = subprocess.run([sys.executable, "-m", "hypersam", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == run("--version").stdout
    wrong = subprocess.run(
        [sys.executable, "-m", "hypersam", "inspect", "none.pth", "--json"], capture_output=True, text=True, check=False
    )
    assert (wrong.returncode, json.loads(wrong.stdout)["error"]["code"]) == (1, "not_a_checkpoint")


def test_help_and_version_answer_without_torch() -> None:
    assert "compress" in run("--help").stdout
    assert run("--version").stdout.startswith("hypersam ")
    code = "import sys, hypersam.cli, hypersam; assert 'torch' not in sys.modules; print(hypersam.__all__)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
