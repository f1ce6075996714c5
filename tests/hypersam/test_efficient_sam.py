"""EfficientSAM against a composition in float64, its own rules for pictures and prompts, and the way there and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hypersam
from benchmarks.random_sam import layout, spread_like
from hypersam.checkpoint import read_checkpoint
from hypersam.cli.offline import run_decompress
from hypersam.errors import LayoutMismatch, PromptError
from hypersam.sam.detect import detect
from hypersam.sam.families.efficient_sam import EfficientSam, EfficientSamConfig
from hypersam.sam.model import SamModel
from hypersam.sam.network import Prompts
from hypersam.sam.predictor import SamPredictor
from tests.hypersam.naive_sam import (
    State,
    attend,
    doubled,
    fourier,
    gelu,
    grid_fourier,
    layer_norm,
    linear,
    neck,
    projected_attention,
    relative,
    under,
)

SMALL = EfficientSamConfig(
    image_size=1024, patch=32, table=5, embed_dim=128, heads=2, depth=2, mlp_dim=96, dim=32, multimask_outputs=3,
    decoder_depth=2, decoder_mlp_dim=48, iou_depth=2, iou_hidden=40, upscaling=(16, 8),
)  # fmt: skip
POINT = {"point_coords": np.array([[30.0, 20.0]]), "point_labels": np.array([1])}
BOX = {"box": np.array([5.0, 8.0, 90.0, 60.0])}
THREE = {"point_coords": np.array([[30.0, 20.0], [60.5, 40.25], [80.0, 3.0]]), "point_labels": np.array([1, 1, 1])}
PROMPTS = [POINT, THREE, BOX, POINT | BOX, THREE | BOX]


def network(config: EfficientSamConfig = SMALL, *, seed: int = 0) -> EfficientSam:
    with torch.device("meta"):
        made = EfficientSam(config)
    made.load_state_dict(spread_like(made, seed=seed), strict=True, assign=True)
    return made.eval().requires_grad_(False)


def predictor(config: EfficientSamConfig = SMALL) -> SamPredictor:
    return SamPredictor(
        SamModel(network(config), variant="efficient_sam", device=torch.device("cpu"), dtype=torch.float32)
    )


def picture(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


# --- the network in float64, from the state dict alone ---------------------------------------------------


def naive_encode(state: State, config: EfficientSamConfig, pixels: Tensor) -> Tensor:
    s = under(state, "image_encoder.")
    x = F.conv2d(pixels, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=config.patch)
    table = s["pos_embed"][0, 1:].T.reshape(1, -1, config.table, config.table)
    x = x + F.interpolate(table, (config.grid, config.grid), mode="bicubic", align_corners=False)
    x = x.flatten(2).transpose(1, 2)
    for i in range(config.depth):
        b = under(s, f"blocks.{i}.")
        q, k, v = linear(under(b, "attn.qkv."), layer_norm(under(b, "norm1."), x, 1e-6)).chunk(3, -1)
        x = x + linear(under(b, "attn.proj."), attend(q, k, v, config.heads))
        y = linear(under(b, "mlp.fc1."), layer_norm(under(b, "norm2."), x, 1e-6))
        x = x + linear(under(b, "mlp.fc2."), gelu(y))
    return neck(under(s, "neck."), x.transpose(1, 2).reshape(1, -1, config.grid, config.grid))


def naive_mlp(s: State, x: Tensor) -> Tensor:
    i = 0
    while f"layers.{i}.0.weight" in s:
        x = gelu(linear(under(s, f"layers.{i}.0."), x))
        i += 1
    return linear(under(s, "fc."), x)


def naive_decode(
    state: State, config: EfficientSamConfig, embedding: Tensor, points: Tensor, labels: list[int]
) -> tuple[Tensor, Tensor]:
    """One prompt: ``points`` (N, 2) in pixels of the input, ``labels`` 1, 2 and 3."""
    p, m = under(state, "prompt_encoder."), under(state, "mask_decoder.")
    names = {1: "point_embeddings", 2: "bbox_top_left_embeddings", 3: "bbox_bottom_right_embeddings"}
    rows = [m["iou_token.weight"][0], *m["mask_tokens.weight"]]
    for point, label in zip(points, labels, strict=True):
        rows.append(fourier(p, (point + 0.5) / config.image_size) + p[f"{names[label]}.weight"][0])
    nowhere = fourier(p, torch.full((2,), -0.5, dtype=torch.float64) / config.image_size)
    rows += [nowhere + p["invalid_points.weight"][0]] * (6 - len(labels))
    tokens = torch.stack(rows)[None]
    where = grid_fourier(p, config.grid).flatten(2).transpose(1, 2)
    q, k = tokens, embedding.flatten(2).transpose(1, 2)
    t = under(m, "transformer.")
    for i in range(config.decoder_depth):
        b = under(t, f"layers.{i}.")
        if i:
            q = q + tokens
        q = layer_norm(under(b, "norm1."), q + projected_attention(under(b, "self_attn."), q, q, q, 8), 1e-5)
        a = projected_attention(under(b, "cross_attn_token_to_image."), q + tokens, k + where, k, 8)
        q = layer_norm(under(b, "norm2."), q + a, 1e-5)
        q = layer_norm(under(b, "norm3."), q + naive_mlp(under(b, "mlp."), q), 1e-5)
        a = projected_attention(under(b, "cross_attn_image_to_token."), k + where, q + tokens, q, 8)
        k = layer_norm(under(b, "norm4."), k + a, 1e-5)
    q = q + projected_attention(under(t, "final_attn_token_to_image."), q + tokens, k + where, k, 8)
    q = layer_norm(under(t, "norm_final_attn."), q, 1e-5)[0]
    image = k.transpose(1, 2).reshape(1, -1, config.grid, config.grid)
    first, second = (under(m, f"final_output_upscaling_layers.{i}.") for i in (0, 1))
    image = F.conv_transpose2d(image, first["0.weight"], first["0.bias"], stride=2)
    image = (image - image.mean()) / (image.var(correction=0) + 1e-5).sqrt()
    image = gelu(image * first["1.weight"][:, None, None] + first["1.bias"][:, None, None])
    image = gelu(F.conv_transpose2d(image, second["0.weight"], second["0.bias"], stride=2))[0]
    masks = [
        torch.einsum("c,chw->hw", naive_mlp(under(m, f"output_hypernetworks_mlps.{i}."), q[1 + i]), image)
        for i in range(4)
    ]
    return torch.stack(masks), naive_mlp(under(m, "iou_prediction_head."), q[0])


@pytest.mark.parametrize("shape", [(90, 140), (64, 64)])
def test_answers_match_a_composition_in_float64(shape: tuple[int, int]) -> None:
    mine = predictor()
    state = doubled(mine.model.network.state_dict())
    image = picture(*shape)
    mine.set_image(image)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].double() / 255
    pixels = F.interpolate(pixels, (1024, 1024), mode="bilinear", align_corners=False)
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    embedding = naive_encode(state, SMALL, (pixels - mean) / std)
    assert relative(mine.get_image_embedding(), embedding) < 1e-4
    factor = torch.tensor([1024 / shape[1], 1024 / shape[0]], dtype=torch.float64)
    for prompt in PROMPTS:
        points = torch.from_numpy(np.array(prompt.get("point_coords", np.zeros((0, 2))))).reshape(-1, 2)
        labels = [1] * len(points)
        if "box" in prompt:
            points, labels = torch.cat([points, torch.from_numpy(prompt["box"]).view(2, 2)]), [*labels, 2, 3]
        masks, iou = naive_decode(state, SMALL, embedding, points * factor, labels)
        for multimask, chosen in ((True, slice(1, 4)), (False, slice(0, 1))):
            got = mine.predict(**prompt, multimask_output=multimask, return_logits=True)
            assert relative(torch.from_numpy(got[2]), masks[chosen]) < 1e-4
            assert relative(torch.from_numpy(got[1]), iou[chosen]) < 1e-4
            upscaled = F.interpolate(masks[None, chosen], shape, mode="bicubic", align_corners=False)[0]
            assert relative(torch.from_numpy(got[0]), upscaled) < 1e-4


def test_zero_belongs_to_the_mask() -> None:
    rules = EfficientSam.rules
    assert rules.binary(torch.tensor([-0.1, 0.0, 0.1])).tolist() == [False, True, True]


def test_points_outside_to_the_left_or_above_lie_at_minus_one() -> None:
    scaled = EfficientSam.rules.scaled(torch.tensor([[-7.0, 20.0], [10.0, 20.0]]), (100, 200), (1024, 1024))
    torch.testing.assert_close(scaled, torch.tensor([[-1.0, 204.8], [51.2, 204.8]]))


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ({"point_coords": np.zeros((2, 2)), "point_labels": np.array([1, 0])}, "no background points"),
        ({"mask_input": np.zeros((1, 128, 128)), **BOX}, "no mask input"),
        ({"point_coords": np.zeros((7, 2)), "point_labels": np.ones(7)}, "at most 6 points .* got 7"),
        ({"point_coords": np.zeros((5, 2)), "point_labels": np.ones(5), **BOX}, "at most 6 points .* got 7"),
    ],
)
def test_what_it_cannot_be_asked_is_said(prompt: dict[str, np.ndarray], said: str) -> None:
    mine = predictor()
    mine.set_image(picture(50, 70))
    with pytest.raises(PromptError, match=said):
        mine.predict(**prompt)


def test_several_prompts_at_once_are_the_same_as_one_after_another() -> None:
    mine = predictor()
    mine.set_image(picture(64, 80))
    boxes = torch.tensor([[3.0, 5.0, 600.0, 700.0], [100.0, 20.0, 900.0, 1000.0]])
    together = mine.predict_torch(None, None, boxes)
    for i in range(2):
        alone = mine.predict_torch(None, None, boxes[i : i + 1])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i : i + 1].float(), b.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["efficient_sam_ti", "efficient_sam_s"])
def test_the_official_layouts_are_recognised(variant: str) -> None:
    tensors = layout({"efficient_sam_ti": "eff_ti", "efficient_sam_s": "eff_s"}[variant])
    detected = detect(tensors)
    assert (detected.variant, detected.decided_by) == (variant, "shapes")
    assert detected.config.heads == {"efficient_sam_ti": 3, "efficient_sam_s": 6}[variant]
    assert EfficientSamConfig.from_dict(detected.config.as_dict()) == detected.config


def test_a_key_too_few_or_too_many_is_named() -> None:
    whole = layout("eff_ti")
    with pytest.raises(LayoutMismatch, match=r"missing: image_encoder\.blocks\.7\.mlp\.fc2\.bias"):
        detect({k: v for k, v in whole.items() if k != "image_encoder.blocks.7.mlp.fc2.bias"})
    with pytest.raises(LayoutMismatch, match=r"unexpected: prompt_encoder\.no_mask_embed"):
        detect(whole | {"prompt_encoder.no_mask_embed.weight": torch.empty(1, 256)})


def test_a_smaller_network_cuts_the_stretched_table() -> None:
    config = replace(SMALL, patch=16, image_size=320, table=14)
    whole = network(config)
    small = whole.reduced(160)
    assert (small.low_res, small.config.grid) == (40, 10)
    middle = whole.image_encoder._positions().view(20, 20, -1)[5:15, 5:15].reshape(1, 100, -1)
    torch.testing.assert_close(small.image_encoder._positions(), middle)
    features = small.encode(torch.randn(2, 3, 160, 160))
    assert features[0].shape == (2, 32, 10, 10)
    assert whole.image_encoder.grid == 20
    for side in (0, 150, 336):
        with pytest.raises(ValueError, match="multiple of 16 up to 320"):
            whole.reduced(side)


def test_gradients_are_the_same_when_blocks_are_computed_twice() -> None:
    grown = network(replace(SMALL, patch=16, image_size=128, table=6)).requires_grad_(True)
    pixels = torch.randn(1, 3, 128, 128)
    found = []
    for recompute in (False, True):
        grown.zero_grad()
        masks, iou = grown.every_mask(
            grown.encode(pixels, recompute=recompute), Prompts(boxes=torch.tensor([[4.0, 8.0, 90.0, 80.0]]))
        )
        (masks.square().mean() + iou.square().mean()).backward()
        found.append({name: p.grad.clone() for name, p in grown.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == {name for name, _ in grown.named_parameters()}
    assert all(float(grad.abs().max()) > 0 for name, grad in found[0].items() if "point_embeddings" not in name)
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, msg=name)


def test_the_encoder_runs_in_half_precision() -> None:
    mine = network()
    pixels = torch.randn(1, 3, 1024, 1024)
    exact = mine.encode(pixels)[0]
    mine.image_encoder.to(torch.bfloat16)
    rough = mine.encode(pixels.bfloat16())[0].float()
    assert float(F.cosine_similarity(rough.flatten(), exact.flatten(), dim=0)) > 0.999


@pytest.mark.parametrize(("codec", "preset"), [("lattice", "5x"), ("orbit", "8x")])
def test_from_a_checkpoint_to_masks_and_back(tmp_path: Path, codec: str, preset: str) -> None:
    state = network(replace(SMALL, embed_dim=64, heads=1)).state_dict()
    torch.save({"model": state}, tmp_path / "a.pt")
    report = hypersam.compress(
        tmp_path / "a.pt", tmp_path / "a.hsam", codec=codec, options={"preset": preset, "fidelity": codec == "lattice"}
    )
    assert report.variant == "efficient_sam"
    assert report.fp32_ratio >= float(preset[:-1])
    mine = hypersam.load(tmp_path / "a.hsam")
    mine.set_image(picture(70, 100))
    for prompt in PROMPTS:
        masks, scores, low = mine.predict(**prompt)
        assert (masks.shape, scores.shape, low.shape) == ((3, 70, 100), (3,), (3, 128, 128))
    run_decompress(tmp_path / "a.hsam", tmp_path / "back.pt", as_json=True)
    given = read_checkpoint(tmp_path / "back.pt").tensors
    assert given.keys() == state.keys()
    assert all((given[k].dtype, given[k].shape) == (v.dtype, v.shape) for k, v in state.items())
