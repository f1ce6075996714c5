"""SAM 2 from a checkpoint to masks; its parity with the official code is in ``tests/oracles``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import hypersam
from benchmarks import random_sam
from hypersam.checkpoint import read_checkpoint
from hypersam.cli.offline import run_decompress
from hypersam.errors import LayoutMismatch
from hypersam.reports import describe_artifact
from hypersam.sam.detect import detect
from hypersam.sam.families import sam2
from hypersam.sam.families.decoder import DecoderConfig
from hypersam.sam.families.sam2 import Sam2, Sam2Config, stability
from hypersam.sam.network import Prompts

SMALL = Sam2Config(
    releases=(21,), image_size=256, embed_dim=16, heads=1, stages=(1, 2, 3, 1), global_blocks=(4,),
    windows=(8, 4, 14, 7), background=7, mlp_ratio=4,
    decoder=DecoderConfig(
        dim=32, mask_in_chans=16, multimask_outputs=3, depth=2, mlp_dim=64, iou_depth=3, iou_hidden=64
    ),
)  # fmt: skip


def network(config: Sam2Config = SMALL, *, seed: int = 0) -> Sam2:
    made = Sam2(config)
    made.load_state_dict(random_sam.spread(Sam2, config, seed=seed))
    return made.eval()


def test_one_is_compressed_and_segments_and_keeps_its_video_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Heads and windows do not show in shapes; this size is made one of the known ones.
    monkeypatch.setitem(sam2._PUBLISHED, (16, SMALL.stages), (1, SMALL.global_blocks, SMALL.windows))
    state = random_sam.spread(Sam2, SMALL, seed=1) | {
        "memory_attention.norm.weight": torch.randn(32),
        "maskmem_tpos_enc": torch.randn(7, 1, 1, 8),
        "no_obj_embed_spatial": torch.randn(1, 8),
        "sam_mask_decoder.pred_obj_score_head.layers.0.weight": torch.randn(32, 32),
    }
    torch.save({"model": state}, tmp_path / "source.pt")
    options = {"policy": "equal_error", "fidelity": False}
    report = hypersam.compress(tmp_path / "source.pt", tmp_path / "small.hsam", options=options)
    assert (report.family, report.variant) == ("sam2_hiera", "sam2_hiera")
    # What is only carried is in no memory.
    loaded = hypersam.load(tmp_path / "small.hsam").model.resident_bytes()
    for told in (report.resident_bytes, describe_artifact(tmp_path / "small.hsam")["resident_bytes"]):
        assert told == pytest.approx(loaded, rel=0.01)
    run_decompress(tmp_path / "small.hsam", tmp_path / "back.safetensors", as_json=False)
    back = read_checkpoint(tmp_path / "back.safetensors").tensors
    assert {k: (t.shape, t.dtype) for k, t in back.items()} == {k: (t.shape, t.dtype) for k, t in state.items()}
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    answers = []
    for file in ("small.hsam", "back.safetensors"):
        predictor = hypersam.load(tmp_path / file)
        predictor.set_image(image)
        answers.append(predictor.predict(box=np.array([5.0, 6.0, 70.0, 50.0]), return_logits=True))
    (ours, scores, low), (theirs, _, _) = answers
    assert (ours.shape, scores.shape, low.shape) == ((3, 60, 90), (3,), (3, 256, 256))
    assert np.abs(low).max() <= 32
    # What compressed layers answer is what the weights that they decode to answer.
    assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs)


def test_sizes_that_nobody_published_are_refused_with_the_reason() -> None:
    with pytest.raises(LayoutMismatch, match=r"heads and windows .* do not show .* 16: 1, 2, 3, 1"):
        detect(random_sam.spread(Sam2, SMALL, seed=0))


def test_a_single_mask_that_is_not_stable_is_the_best_of_three() -> None:
    made = network()
    features = made.encode(torch.randn(1, 3, 256, 256))
    prompts = Prompts(points=(torch.rand(40, 1, 2) * 256, torch.ones(40, 1)))
    masks, iou = made.every_mask(features, prompts)
    single, score = made.decode(features, prompts, multimask=False)
    stable = []
    for i in range(40):
        inner, outer = int((masks[i, 0] > 0.05).sum()), int((masks[i, 0] > -0.05).sum())
        stable.append(inner >= 0.98 * outer)
        expected = 0 if stable[-1] else 1 + int(iou[i, 1:].argmax())
        assert torch.equal(single[i, 0], masks[i, expected])
        assert score[i, 0] == iou[i, expected]
    assert torch.equal(stability(torch.full((1, 2, 4, 4), -3.0)), torch.ones(1, 2))
    three, _ = made.decode(features, prompts, multimask=True)
    torch.testing.assert_close(three, masks[:, 1:])


def test_a_box_and_its_corners_as_labelled_points_are_not_told_apart() -> None:
    # The box comes first, then the points, then a padding point, whichever of them there are.
    encoder = network().sam_prompt_encoder
    box, point = torch.tensor([[10.0, 20.0, 90.0, 80.0]]), (torch.tensor([[[30.0, 40.0]]]), torch.tensor([[1]]))
    both, _ = encoder(points=point, boxes=box, masks=None)
    only_box, _ = encoder(points=None, boxes=box, masks=None)
    only_point, _ = encoder(points=point, boxes=None, masks=None)
    assert (both.shape[1], only_box.shape[1], only_point.shape[1]) == (4, 3, 2)
    torch.testing.assert_close(both[:, :2], only_box[:, :2])
    torch.testing.assert_close(both[:, 2:], only_point)
    torch.testing.assert_close(only_box[:, 2], encoder.not_a_point_embed.weight)


def test_a_reduced_network_has_the_middle_of_the_positions_and_gives_gradients() -> None:
    whole = network()
    small = whole.reduced(128)
    assert small.low_res == 32
    middle = slice(16, 48)
    torch.testing.assert_close(
        small.image_encoder.trunk._positions(), whole.image_encoder.trunk._positions()[:, middle, middle]
    )
    pixels = torch.randn(1, 3, 128, 128)
    plain = small.encode(pixels)
    for a, b in zip(plain, small.encode(pixels, recompute=True), strict=True):
        torch.testing.assert_close(a, b)
    masks, _ = small.every_mask(plain, Prompts(boxes=torch.tensor([[3.0, 4.0, 60.0, 65.0]])))
    masks.square().mean().backward()
    assert whole.no_mem_embed.grad is not None
    with pytest.raises(ValueError, match="multiple of 64"):
        whole.reduced(96)


@pytest.mark.parametrize("change", [{"stages": (1, 2)}, {"heads": 3}, {"windows": (7, 4, 14, 7)}])
def test_a_configuration_that_is_none_is_refused(change: dict[str, object]) -> None:
    assert Sam2Config.from_dict(SMALL.as_dict()) == SMALL
    with pytest.raises(ValueError, match=next(iter(change))):
        Sam2Config.from_dict(SMALL.as_dict() | change)


def test_the_picture_is_stretched_with_antialiasing() -> None:
    # A stripe of one pixel in twenty: without antialiasing it is missed or taken whole.
    image = np.zeros((40, 400, 3), np.uint8)
    image[:, ::20] = 255
    pixels = Sam2.rules.resized(image, 64)
    assert pixels.shape == (1, 3, 64, 64)
    assert abs(float(pixels.mean()) - 1 / 20) < 0.005
    assert float(pixels.max()) < 0.5
    assert replace(SMALL, image_size=128).grid == 8
