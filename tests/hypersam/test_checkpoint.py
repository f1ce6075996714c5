"""Checkpoints that are none: each is refused with its own code, and nothing in a pickle is ever run."""

from __future__ import annotations

import argparse
import datetime
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import hypersam
from benchmarks.random_sam import layout
from hypersam.checkpoint import container_of, read_checkpoint, sha256_of
from hypersam.errors import CheckpointError, HypersamError
from hypersam.sam.detect import detect
from tests.models import official_sam, save_checkpoint


class Bomb:
    """A pickle of this would create the named file on loading."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


def code_of(path: Path) -> str:
    with pytest.raises(HypersamError) as caught:
        read_checkpoint(path)
    assert path.name in str(caught.value)
    return caught.value.code


@pytest.mark.parametrize(
    "wrapper",
    ["", "model", "state_dict", "model_state_dict", "module", "net", "sam_model", "ema", "state_dict.model",
     "model.state_dict", "model.module.net.sam"],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "module.", "module.module.", "model.", "_orig_mod.module.", "sam._orig_mod."])
def test_wrappers_and_prefixes_are_removed(tmp_path: Path, wrapper: str, prefix: str) -> None:
    state = official_sam().state_dict()
    content: dict[str, Any] = {prefix + k: v for k, v in state.items()}
    for name in reversed(wrapper.split(".") if wrapper else []):
        content = {name: content, "epoch": 3, "rng": torch.zeros(4)}
    torch.save(content, tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert (checkpoint.wrapper, checkpoint.prefix, checkpoint.container) == (wrapper, prefix, "zip")
    assert checkpoint.tensors.keys() == state.keys()
    assert all(torch.equal(checkpoint.tensors[k], v) for k, v in state.items())


def test_averaged_weights_are_taken_where_there_are_no_others(tmp_path: Path) -> None:
    torch.save({"ema": {"w": torch.ones(2)}, "model": {"w": torch.zeros(2)}}, tmp_path / "both.pth")
    both = read_checkpoint(tmp_path / "both.pth")
    assert (both.wrapper, both.tensors["w"].tolist()) == ("model", [0, 0])
    torch.save({"ema": {"w": torch.ones(2)}, "model": None}, tmp_path / "one.pth")
    assert read_checkpoint(tmp_path / "one.pth").wrapper == "ema"


def test_weights_are_not_left_for_what_lies_among_them(tmp_path: Path) -> None:
    state = official_sam().state_dict()
    torch.save({**state, "ema": {"decay": torch.ones(1)}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"'ema' \(a dict\) should be names with tensors"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("keys", "prefix"),
    [
        (["module.a", "module.b"], "module."),
        (["module.a", "b"], ""),  # not of all
        (["module.", "module.a"], ""),  # nothing is left of one
        (["module.module.a", "module.b"], "module."),
        (["modules.a", "modules.b"], ""),
    ],
)
def test_a_prefix_is_that_of_all_keys(tmp_path: Path, keys: list[str], prefix: str) -> None:
    torch.save({key: torch.zeros(1) for key in keys}, tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth")
    assert (found.prefix, [found.prefix + key for key in found.tensors]) == (prefix, keys)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_numbers_and_strings_among_the_weights_are_passed_over_and_named(tmp_path: Path, prefix: str) -> None:
    state = official_sam().state_dict()
    plain = {"epoch": 3, "best": 0.5, "name": "vit", "done": True, "seed": None}
    torch.save({prefix + k: v for k, v in state.items()} | plain, tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth")
    assert (found.tensors.keys(), found.prefix, found.passed_over) == (state.keys(), prefix, tuple(plain))
    planned = hypersam.plan(tmp_path / "a.pth", options={"policy": "equal_error"})
    assert "no tensors, passed over: epoch, best, name, done, seed" in planned.notices
    torch.save(state, tmp_path / "b.pth")
    assert not [n for n in hypersam.plan(tmp_path / "b.pth", options={"policy": "equal_error"}).notices if "over" in n]


def test_a_dictionary_within_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, tmp_path / "a.pth")
    assert code_of(tmp_path / "a.pth") == "bad_checkpoint"


def test_all_containers_give_the_same_tensors(tmp_path: Path) -> None:
    state = official_sam().state_dict()
    torch.save(state, tmp_path / "zip.pth")
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "a.safetensors")
    for name, container in (("zip.pth", "zip"), ("legacy.pth", "legacy"), ("a.safetensors", "safetensors")):
        checkpoint = read_checkpoint(tmp_path / name)
        assert checkpoint.container == container == container_of(tmp_path / name)
        assert all(torch.equal(checkpoint.tensors[k], v) for k, v in state.items())


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_training_scripts_keep_beside_the_weights_is_passed_over(tmp_path: Path, protocol: int) -> None:
    state = official_sam().state_dict()
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    content = {
        "model": state, "optimizer": optimizer.state_dict(), "epoch": 3, "best": np.float64(0.5),
        "args": argparse.Namespace(lr=1e-4, out=tmp_path), "history": np.arange(3), "rng": torch.get_rng_state(),
        "when": datetime.datetime(2026, 1, 1), "shape": torch.Size([1]), "sets": {"a", "b"},
    }  # fmt: skip
    torch.save(content, tmp_path / "a.pth", pickle_protocol=protocol)
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert checkpoint.wrapper == "model"
    assert checkpoint.tensors.keys() == state.keys()
    assert all(torch.equal(checkpoint.tensors[k], v) for k, v in state.items())


def test_a_description_under_the_name_of_a_wrapper(tmp_path: Path) -> None:
    state = official_sam().state_dict()
    torch.save({"model": {"name": "vit_b", "depth": 12}, "state_dict": state}, tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert (checkpoint.wrapper, checkpoint.tensors.keys()) == ("state_dict", state.keys())


def test_weights_that_are_arrays_are_named(tmp_path: Path) -> None:
    torch.save({"model": {"w": np.zeros(3)}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="'w' is a NumPy array; dense ones are read"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path, new_format: bool) -> None:
    ran = tmp_path / "ran"
    path = tmp_path / "evil.pth"
    torch.save({"image_encoder.pos_embed": torch.zeros(3), "x": Bomb(ran)}, path,
               _use_new_zipfile_serialization=new_format)  # fmt: skip
    assert code_of(path) == "unsafe_checkpoint"
    assert not ran.exists()
    pickle.loads(pickle.dumps(Bomb(ran)))  # the bomb is a live one
    assert ran.exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Bomb(ran), protocol=protocol))
    assert code_of(tmp_path / "evil.pt") == "unsafe_checkpoint"
    assert not ran.exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_cut_anywhere_are_refused(tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"whole.{suffix}"
    if suffix == "pth":
        save_checkpoint(whole)
    else:
        save_file(official_sam().state_dict(), whole)
    data = whole.read_bytes()
    for cut in [1, 7, 8, 9, 30, 100, *range(1000, len(data), max(1, len(data) // 40)), len(data) - 1]:
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(data[:cut])
        assert code_of(path) == "not_a_checkpoint", cut


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty_checkpoint"),
        (b"hello, this is a text file", "not_a_checkpoint"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not_a_checkpoint"),
        (b"\x80\x02garbage", "not_a_checkpoint"),
        (b"PK\x03\x04" + bytes(50), "not_a_checkpoint"),
        ((20).to_bytes(8, "little") + b'{"a":"not tensors" }' + bytes(9), "not_a_checkpoint"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, code: str) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    assert code_of(tmp_path / "a.pth") == code


def test_a_zip_of_something_else_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("efficient_sam_vits.pt", b"a checkpoint inside")
    assert code_of(tmp_path / "a.pt") == "not_a_checkpoint"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ({}, "empty_checkpoint"),
        ({"model": {}}, "empty_checkpoint"),
        ([torch.zeros(2)], "bad_checkpoint"),
        (torch.zeros(2), "bad_checkpoint"),
        ({"epoch": 3}, "bad_checkpoint"),
        ({"epoch": [3], "w": torch.zeros(2)}, "bad_checkpoint"),
        ({"args": argparse.Namespace(lr=1), "w": torch.zeros(2)}, "bad_checkpoint"),
        ({1: 3, "w": torch.zeros(2)}, "bad_checkpoint"),
        ({1: torch.zeros(2)}, "bad_checkpoint"),
        ({"w": torch.zeros(2, 2).to_sparse()}, "bad_checkpoint"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "bad_checkpoint"),
    ],
)
def test_contents_that_are_no_state_dict_are_refused(tmp_path: Path, content: object, code: str) -> None:
    torch.save(content, tmp_path / "a.pth")
    assert code_of(tmp_path / "a.pth") == code


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    assert code_of(tmp_path / "none.pth") == "not_a_checkpoint"


def refuse(state: dict[str, torch.Tensor], variant: str | None = None) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        detect(state, variant=variant)
    return caught.value


def test_an_unknown_network_lists_what_is_known() -> None:
    error = refuse({"conv1.weight": torch.zeros(1)})
    assert error.code == "unknown_family"
    assert "conv1.weight" in str(error)
    assert "SAM ViT-B" in str(error)


def test_missing_unexpected_and_misshapen_keys_are_listed() -> None:
    state = official_sam().state_dict()
    del state["mask_decoder.iou_token.weight"]
    state["image_encoder.extra"] = torch.zeros(2)
    state["image_encoder.blocks.1.norm1.bias"] = torch.zeros(5)
    error = refuse(state)
    assert error.code == "layout_mismatch"
    for part in ("mask_decoder.iou_token.weight", "image_encoder.extra", "(5,), should be (32,)"):
        assert part in str(error)


def test_sides_of_petabytes_without_a_value_are_of_no_network() -> None:
    state = layout("sam2_t")
    key = "sam_mask_decoder.iou_prediction_head.layers.0.weight"
    assert refuse({**state, key: torch.empty(1 << 62, 0)}).code == "layout_mismatch"
    assert refuse({**state, key: torch.empty(1 << 40, 256, device="meta")}).code == "layout_mismatch"


def test_every_missing_key_is_a_clear_refusal() -> None:
    whole = official_sam().state_dict()
    for key in whole:
        state = {k: v for k, v in whole.items() if k != key}
        assert refuse(state).code in {"layout_mismatch", "unknown_family"}, key


def test_a_wrong_variant_is_refused() -> None:
    state = official_sam().state_dict()
    assert refuse(state, "sam_vit_b").code == "variant_mismatch"
    assert refuse(state, "sam_vit_x").code == "variant_mismatch"
    assert detect(state, variant="sam_vit").variant == "sam_vit"


def test_hashes_are_those_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
