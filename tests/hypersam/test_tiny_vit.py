"""TinyViT and SAM-HQ from a checkpoint to masks, and their attention against a plain float64 composition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import hypersam
import hypersam.sam.model
import hypersam.sam.network
from benchmarks import random_sam
from hypersam.checkpoint import read_checkpoint
from hypersam.cli.offline import run_decompress
from hypersam.errors import LayoutMismatch
from hypersam.sam.detect import detect
from hypersam.sam.families.decoder import DecoderConfig
from hypersam.sam.families.sam_hq import SamHq
from hypersam.sam.families.sam_vit import SamViTConfig
from hypersam.sam.families.tiny_vit import SamHqTinyViT, SamTinyViT, TinyViTConfig, _Attention
from hypersam.sam.network import SamNetwork, sharing
from hypersam.sam.predictor import SamPredictor

DECODER = DecoderConfig(dim=32, mask_in_chans=16, multimask_outputs=3, depth=2, mlp_dim=64, iou_depth=3, iou_hidden=64)
TINY = TinyViTConfig(
    image_size=1024, widths=(16, 32, 48, 64), depths=(1, 1, 2, 1), heads=(2, 3, 4), windows=(7, 14, 7),
    bottleneck=64, mlp_dims=(128, 192, 256), decoder=DECODER,
)  # fmt: skip
VIT = SamViTConfig(
    image_size=64, patch=8, embed_dim=32, heads=2, mlp_dim=128, windows=(4, 0, 0), decoder=DECODER
)  # fmt: skip
NETWORKS: dict[str, tuple[type[SamNetwork], TinyViTConfig | SamViTConfig]] = {
    "sam_tiny_vit": (SamTinyViT, TINY),
    "sam_hq_tiny_vit": (SamHqTinyViT, TINY),
    "sam_hq_vit": (SamHq, VIT),
}


@pytest.mark.parametrize(
    ("family", "codec", "preset", "fidelity"),
    [
        ("sam_tiny_vit", "lattice", "5x", True),
        ("sam_hq_tiny_vit", "orbit", "6.5x", False),
        ("sam_hq_vit", "lattice", "5x", False),
    ],
)
def test_a_checkpoint_is_compressed_and_segments(
    family: str, codec: str, preset: str, fidelity: bool, tmp_path: Path
) -> None:
    network, config = NETWORKS[family]
    state = random_sam.spread(network, config, seed=3)
    extra = {}
    if family != "sam_hq_vit":
        extra = {"image_encoder.norm_head.weight": torch.randn(64), "image_encoder.head.weight": torch.randn(9, 64)}
    torch.save({"model": state | extra}, tmp_path / "source.pth")
    report = hypersam.compress(
        tmp_path / "source.pth",
        tmp_path / "small.hsam",
        codec=codec,
        options={"preset": preset, "policy": "equal_error", "fidelity": fidelity},
    ).as_dict()
    assert report["family"] == family
    back = tmp_path / "back.safetensors"
    run_decompress(tmp_path / "small.hsam", back, as_json=False)
    tensors = read_checkpoint(back).tensors
    assert {k: (t.shape, t.dtype) for k, t in tensors.items()} == {
        k: (t.shape, t.dtype) for k, t in (state | extra).items()
    }
    counters = [k for k, t in state.items() if t.dtype == torch.int64]
    assert all(torch.equal(tensors[k], state[k]) for k in counters)

    # What compressed layers answer is what the weights that they decode to answer.
    small, dense = hypersam.load(tmp_path / "small.hsam"), hypersam.load(back)
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    for each in (small, dense):
        each.set_image(image)
    side = small.model.low_res
    prompts = [
        {"point_coords": np.array([[20.0, 30.0]]), "point_labels": np.array([1])},
        {"point_coords": np.array([[20.0, 30.0], [5.0, 50.0]]), "point_labels": np.array([1, 0])},
        {"box": np.array([5.0, 6.0, 70.0, 50.0])},
        {"point_coords": np.array([[20.0, 30.0]]), "point_labels": np.array([1]), "box": np.array([5.0, 6, 70, 50])},
        {"mask_input": np.random.default_rng(1).normal(0, 4, (1, side, side)).astype(np.float32)},
    ]
    for prompt in prompts:
        for multimask in (True, False):
            ours, scores, low = small.predict(**prompt, multimask_output=multimask, return_logits=True)
            theirs, _, _ = dense.predict(**prompt, multimask_output=multimask, return_logits=True)
            count = 3 if multimask and "hq" not in family else 1
            assert ours.shape == (count, 60, 90)
            assert (scores.shape, low.shape) == ((count,), (count, side, side))
            assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs)


def test_half_precision_and_counters_come_back_as_they_were(tmp_path: Path) -> None:
    state = random_sam.spread(SamTinyViT, TINY, seed=5) | {"image_encoder.head.weight": torch.randn(9, 64)}
    halves = {key: t.half() if t.is_floating_point() else t for key, t in state.items()}
    torch.save({"state_dict": {f"module.{key}": t for key, t in halves.items()}}, tmp_path / "half.pth")
    options = {"policy": "equal_error", "fidelity": False}
    hypersam.compress(tmp_path / "half.pth", tmp_path / "half.hsam", options=options)
    run_decompress(tmp_path / "half.hsam", tmp_path / "back.safetensors", as_json=False)
    back = read_checkpoint(tmp_path / "back.safetensors").tensors
    assert {k: (t.shape, t.dtype) for k, t in back.items()} == {k: (t.shape, t.dtype) for k, t in halves.items()}
    assert {torch.float16, torch.int64} == {t.dtype for t in back.values()}
    for key, tensor in halves.items():
        if tensor.dtype == torch.int64:
            assert torch.equal(back[key], tensor)
        else:
            error = torch.linalg.vector_norm(back[key].double() - tensor.double())
            assert error <= 0.3 * torch.linalg.vector_norm(tensor.double())


def test_attention_is_softmax_of_scores_and_biases_by_distance() -> None:
    torch.manual_seed(0)
    attention = _Attention(12, 3, 5).double().eval()
    with torch.no_grad():
        attention.attention_biases.normal_()
        x = torch.randn(2, 25, 12, dtype=torch.float64)
        found = attention(x)
        qkv = attention.qkv(attention.norm(x)).view(2, 25, 3, 12)
        expected = torch.empty_like(x)
        for b in range(2):
            for head in range(3):
                q, k, v = qkv[b, :, head].split(4, -1)
                scores = q @ k.T / 2
                for i in range(25):
                    for j in range(25):
                        down, across = abs(i // 5 - j // 5), abs(i % 5 - j % 5)
                        scores[i, j] += attention.attention_biases[head, 5 * down + across]
                expected[b, :, 4 * head : 4 * head + 4] = scores.softmax(-1) @ v
        torch.testing.assert_close(found, attention.proj(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", NETWORKS)
def test_a_reduced_network_shares_layers_and_gives_gradients(family: str) -> None:
    network, config = NETWORKS[family]
    whole = network(config)
    whole.load_state_dict(random_sam.spread(network, config, seed=1))
    whole.eval()
    side = 32 if family == "sam_hq_vit" else 128
    small = whole.reduced(side)
    assert small.low_res * whole.config.image_size == whole.low_res * side
    pixels = torch.randn(1, 3, side, side)
    plain = small.encode(pixels)
    for a, b in zip(plain, small.encode(pixels, recompute=True), strict=True):
        torch.testing.assert_close(a, b)
    masks, _ = small.every_mask(plain, hypersam.sam.network.Prompts(boxes=torch.tensor([[3.0, 4.0, 20.0, 25.0]])))
    assert masks.shape[1] == (4 if family == "sam_tiny_vit" else 5)
    masks.square().mean().backward()
    assert whole.image_encoder.neck[0].weight.grad is not None
    with pytest.raises(ValueError, match="multiple of"):
        whole.reduced(side + 1)


def test_tiny_sam_has_three_masks_whatever_is_asked() -> None:
    network = SamTinyViT(TINY)
    network.load_state_dict(random_sam.spread(SamTinyViT, TINY, seed=2))
    small = network.eval().reduced(128)
    image = np.random.default_rng(4).integers(0, 256, (50, 40, 3), np.uint8)
    answers = {}
    for variant in ("mobile_sam", "tiny_sam"):
        model = hypersam.sam.model.SamModel(small, variant=variant, device=torch.device("cpu"), dtype=torch.float32)
        predictor = SamPredictor(model)
        predictor.set_image(image)
        for multimask in (True, False):
            answers[variant, multimask] = predictor.predict(
                box=np.array([3.0, 4.0, 30.0, 40.0]), multimask_output=multimask, return_logits=True
            )
    assert len(answers["mobile_sam", False][0]) == 1
    for multimask in (True, False):
        # On the same weights they are MobileSAM's three.
        for got, want in zip(answers["tiny_sam", multimask], answers["mobile_sam", True], strict=True):
            np.testing.assert_array_equal(got, want)
    assert len(answers["tiny_sam", False][0]) == 3


@pytest.mark.parametrize("family", ["sam_tiny_vit", "sam_hq_tiny_vit"])
def test_hidden_sizes_are_any(family: str) -> None:
    # Of ratios of 2.5 and 1.3, rounded down as their builders do, and of none.
    config = replace(TINY, bottleneck=40, mlp_dims=(41, 62, 7))
    network = NETWORKS[family][0]
    found = detect(random_sam.spread(network, config, seed=0))
    assert (found.family, found.config) == (family, config)
    assert TinyViTConfig.from_dict(config.as_dict()) == config
    with pytest.raises(ValueError, match="mlp_dims must be 3 positive numbers"):
        TinyViTConfig.from_dict(config.as_dict() | {"mlp_dims": [4, 0, 4]})


def hq_with(windows: tuple[int, ...]) -> SamViTConfig:
    """Of a grid of 8 patches a side."""
    return replace(VIT, windows=windows)


def test_an_hq_without_global_attention_is_refused() -> None:
    with pytest.raises(LayoutMismatch, match="this one has none"):
        detect(random_sam.spread(SamHq, hq_with((4, 4)), seed=0))


@pytest.mark.parametrize("windows", [(8, 0), (8, 8, 0), (0, 0), (8, 8)])
def test_an_hq_whose_windows_are_its_picture_is_refused(windows: tuple[int, ...]) -> None:
    # The shapes of these are the same, and features are taken from another block of each.
    with pytest.raises(LayoutMismatch, match=r"does not show in these shapes.* all blocks have the 8 patches"):
        detect(random_sam.spread(SamHq, hq_with(windows), seed=0))


@pytest.mark.parametrize("windows", [(0,), (4, 0, 4), (0, 14, 0, 0)])
def test_global_blocks_show_beside_other_windows_and_alone(windows: tuple[int, ...]) -> None:
    assert detect(random_sam.spread(SamHq, hq_with(windows), seed=0)).config.windows == windows


@pytest.mark.parametrize(
    ("depth", "named"), [(12, (2, 5, 8, 11)), (24, (5, 11, 17, 23)), (32, (7, 15, 23, 31))]
)  # fmt: skip
def test_published_depths_tell_the_global_blocks_of_such_an_hq(depth: int, named: tuple[int, ...]) -> None:
    windows = tuple(0 if i in named else 8 for i in range(depth))
    state = random_sam.spread(SamHq, hq_with((0,) * depth), seed=0)
    found = detect(state)
    assert found.config.windows == windows
    network = sharing(found.described.network, found.config, state)
    assert isinstance(network, SamHq)
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        early = network.image_encoder.with_early(pixels)[1]
        x = network.image_encoder.patch_embed(pixels) + network.image_encoder.pos_embed
        for block in network.image_encoder.blocks[: named[0] + 1]:
            x = block(x)
    torch.testing.assert_close(early, x.permute(0, 3, 1, 2))
