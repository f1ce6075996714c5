"""EdgeSAM against a composition in float64, its layout, its rules, and the way there and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor

import hypersam
from benchmarks.random_sam import layout, spread_like
from hypersam.checkpoint import read_checkpoint
from hypersam.cli.offline import run_decompress
from hypersam.errors import LayoutMismatch
from hypersam.sam.detect import detect
from hypersam.sam.families.decoder import DecoderConfig
from hypersam.sam.families.edge_sam import EdgeSam, EdgeSamConfig, stability
from hypersam.sam.model import SamModel
from hypersam.sam.network import Prompts
from hypersam.sam.predictor import SamPredictor
from hypersam.sam.registry import family_row
from hypersam.sensitivity import _statistics, measure
from tests.hypersam.naive_sam import State, doubled, gelu, neck, relative, under

SMALL = EdgeSamConfig(
    image_size=1024, stem=4, widths=(8, 12, 16, 24), depths=(1, 2, 3, 1), squeezes=(8, 0, 8, 16), excited=(1, 7, 9, 10),
    mixers=(16, 30, 32, 60), decoder=DecoderConfig(
        dim=32, mask_in_chans=16, multimask_outputs=3, depth=2, mlp_dim=64, iou_depth=3, iou_hidden=32
    ),
)  # fmt: skip
SHALLOW = replace(
    SMALL, depths=(1, 0, 1, 0), excited=(1,), squeezes=(8, 0, 0, 0), widths=(16, 24, 48, 96),
    mixers=(32, 48, 96, 192), decoder=replace(SMALL.decoder, dim=64, depth=1, mlp_dim=1024),
)  # fmt: skip
POINT = {"point_coords": np.array([[30.0, 20.0]]), "point_labels": np.array([1])}
POINTS = {"point_coords": np.array([[30.0, 20.0], [90.5, 4.25]]), "point_labels": np.array([1, 0])}
BOX = {"box": np.array([5.0, 8.0, 90.0, 60.0])}
MASK = {"mask_input": np.random.default_rng(3).normal(0, 5, (1, 256, 256)).astype(np.float32)}
PROMPTS = [POINT, POINTS, BOX, POINTS | BOX, POINTS | MASK, MASK]


def network(config: EdgeSamConfig = SMALL, *, seed: int = 0) -> EdgeSam:
    with torch.device("meta"):
        made = EdgeSam(config)
    made.load_state_dict(spread_like(made, seed=seed), strict=True, assign=True)
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("config", [SMALL, SHALLOW, replace(SHALLOW, depths=(0, 1, 2, 0), mixers=(0, 50, 97, 190))])
def test_sizes_are_read_off_the_shapes(config: EdgeSamConfig) -> None:
    config = replace(config, excited=(1,), squeezes=(8, 0, 0, 0) if config.depths[0] else (0, 8, 0, 0))
    assert detect(network(config).state_dict()).config == config
    assert EdgeSamConfig.from_dict(config.as_dict()) == config
    with pytest.raises(ValueError, match="stages each"):
        EdgeSamConfig.from_dict(config.as_dict() | {"mixers": [8]})


def predictor() -> SamPredictor:
    return SamPredictor(SamModel(network(), variant="edge_sam", device=torch.device("cpu"), dtype=torch.float32))


def picture(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


# --- the image encoder in float64, branch by branch, from the state dict alone ---------------------------


def conv_norm(s: State, x: Tensor, **how: int) -> Tensor:
    kernel = s["c.weight"].shape[-1]
    x = F.conv2d(x, s["c.weight"], padding=kernel // 2, **how)
    mean, variance, weight, bias = (
        s[f"bn.{n}"].view(-1, 1, 1) for n in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def excite(s: State, x: Tensor) -> Tensor:
    if "1.fc1.weight" not in s:
        return x
    means = x.mean((2, 3), keepdim=True)
    hidden = F.conv2d(means, s["1.fc1.weight"], s["1.fc1.bias"]).clamp_min(0)
    return x / (1 + (-F.conv2d(hidden, s["1.fc2.weight"], s["1.fc2.bias"])).exp())


def block(s: State, x: Tensor) -> Tensor:
    t = under(s, "token_mixer.")
    width = x.shape[1]
    if "2.c.weight" in t:
        x = conv_norm(under(t, "0."), x, stride=2, groups=width)
        x = conv_norm(under(t, "2."), excite(t, x))
    else:
        three, one = (conv_norm(under(t, f"0.{n}."), x, groups=width) for n in ("conv", "conv1"))
        x = excite(t, three + one + x)
    m = under(s, "channel_mixer.m.")
    return x + conv_norm(under(m, "2."), gelu(conv_norm(under(m, "0."), x)))


def naive_encode(state: State, x: Tensor, stages: tuple[int, ...]) -> Tensor:
    s = under(state, "image_encoder.")
    x = conv_norm(under(s, "features.0.2."), gelu(conv_norm(under(s, "features.0.0."), x, stride=2)), stride=2)
    shallow = x
    for i in range(1, stages[-1] + 1):
        x = block(under(s, f"features.{i}."), x)
        if i == stages[-2]:
            shallow = x
    deep = F.conv2d(x, s["fuse_stage3.op_list.0.weight"])
    return neck(under(s, "neck."), F.conv2d(shallow, s["fuse_stage2.weight"]) + doubled_bilinear(deep))


def doubled_bilinear(x: Tensor) -> Tensor:
    """Each output lies a quarter of a cell beside an input's middle; edges repeat."""
    for dim in (2, 3):
        first, last = x.narrow(dim, 0, 1), x.narrow(dim, x.shape[dim] - 1, 1)
        before = torch.cat([first, x.narrow(dim, 0, x.shape[dim] - 1)], dim)
        after = torch.cat([x.narrow(dim, 1, x.shape[dim] - 1), last], dim)
        x = torch.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], dim + 1).flatten(dim, dim + 1)
    return x


@pytest.mark.parametrize("seed", [0, 1])
def test_the_encoder_matches_a_composition_in_float64(seed: int) -> None:
    mine = network(seed=seed)
    pixels = torch.randn(2, 3, 128, 192, generator=torch.Generator().manual_seed(seed))
    got = mine.encode(pixels)[0]
    want = naive_encode(doubled(mine.state_dict()), pixels.double(), (1, 4, 8, 10))
    assert got.shape == want.shape == (2, 32, 8, 12)
    assert relative(got, want) < 1e-4
    assert relative(mine.double().encode(pixels.double())[0], want) < 1e-11


def official_decoder(state: State) -> tuple[PromptEncoder, MaskDecoder]:
    encoder = PromptEncoder(32, (64, 64), (1024, 1024), 16)
    decoder = MaskDecoder(transformer_dim=32, transformer=TwoWayTransformer(2, 32, 8, 64), iou_head_hidden_dim=32)
    encoder.load_state_dict(under(state, "prompt_encoder."))
    decoder.load_state_dict(under(state, "mask_decoder."))
    return encoder.eval(), decoder.eval()


def test_masks_are_those_of_sams_decoder_scored_by_stability() -> None:
    mine = predictor()
    mine.set_image(picture(90, 140))
    encoder, decoder = official_decoder(mine.model.network.state_dict())
    for prompt in PROMPTS:
        points = boxes = masks = None
        if "point_coords" in prompt:
            coordinates = torch.from_numpy(prompt["point_coords"] * [1024 / 140, 658 / 90]).float()[None]
            points = (coordinates, torch.from_numpy(prompt["point_labels"]).int()[None])
        if "box" in prompt:
            boxes = torch.from_numpy(prompt["box"] * np.tile([1024 / 140, 658 / 90], 2)).float()[None]
        if "mask_input" in prompt:
            masks = torch.from_numpy(prompt["mask_input"])[None]
        with torch.inference_mode():
            sparse, dense = encoder(points=points, boxes=boxes, masks=masks)
            for multimask in (True, False):
                logits, _ = decoder(mine.get_image_embedding(), encoder.get_dense_pe(), sparse, dense, multimask)
                _, scores, low = mine.predict(**prompt, multimask_output=multimask)
                assert relative(torch.from_numpy(low), logits[0].double()) < 1e-4
                want = [float((m > 1).sum() / (m > -1).sum().clamp_min(1)) for m in torch.from_numpy(low)]
                np.testing.assert_allclose(scores, want, rtol=1e-6)


def test_stability_of_known_masks() -> None:
    logits = torch.full((3, 4, 4), -9.0)
    logits[0, :2] = 9.0  # sure of all its pixels
    logits[1, :2], logits[1, :1] = 0.5, 9.0  # of half of them
    torch.testing.assert_close(stability(logits), torch.tensor([1.0, 0.5, 0.0]))


def test_the_official_layout_is_recognised_and_a_name_tells_the_variant() -> None:
    tensors = layout("edge")
    detected = detect(tensors)
    assert detected.candidates == ("edge_sam", "edge_sam_3x")
    assert (detected.variant, detected.decided_by) == ("edge_sam", "order")
    named = detect(tensors, name="edge_sam_3x.pth")
    assert (named.variant, named.decided_by) == ("edge_sam_3x", "name")
    named = detect(tensors, name="edge_sam.pth")
    assert (named.variant, named.decided_by) == ("edge_sam", "name")
    assert detected.config.depths == (3, 3, 15, 2)
    assert detected.config.squeezes == (16, 24, 48, 96)
    assert EdgeSamConfig.from_dict(detected.config.as_dict()) == detected.config
    assert family_row("edge_sam").unchecked


def test_other_widths_are_read_off_the_shapes() -> None:
    detected = detect(network().state_dict())
    assert (detected.variant, detected.config) == ("edge_sam", SMALL)


def test_a_key_too_few_or_too_many_is_named() -> None:
    whole = layout("edge")
    last = "image_encoder.features.26.channel_mixer.m.0.c.weight"
    for key in [last, "image_encoder.features.3.token_mixer.0.conv1.bn.running_var", "mask_decoder.iou_token.weight"]:
        with pytest.raises(LayoutMismatch, match=f"missing: {key}"):
            detect({k: v for k, v in whole.items() if k != key})
    with pytest.raises(LayoutMismatch, match=r"unexpected: image_encoder\.head"):
        detect(whole | {"image_encoder.head.weight": torch.empty(3)})
    detect(whole | {"rpn_head.conv.weight": torch.empty(3), "image_encoder.rpn.bias": torch.empty(3)})


def test_a_smaller_network_is_the_same_convolutions() -> None:
    whole = network()
    small = whole.reduced(256)
    pixels = torch.randn(1, 3, 256, 256)
    torch.testing.assert_close(small.encode(pixels)[0], whole.encode(pixels)[0])
    assert (small.grid, small.low_res, whole.grid) == (16, 64, 64)
    masks, _ = small.every_mask(small.encode(pixels), Prompts(boxes=torch.tensor([[9.0, 9.0, 99.0, 99.0]])))
    assert masks.shape == (1, 4, 64, 64)
    for side in (0, 100, 1056):
        with pytest.raises(ValueError, match="multiple of 32 up to 1024"):
            whole.reduced(side)


def test_gradients_are_the_same_when_blocks_are_computed_twice() -> None:
    grown = network().reduced(128).requires_grad_(True)
    pixels = torch.randn(1, 3, 128, 128)
    found = []
    for recompute in (False, True):
        grown.zero_grad()
        grown.encode(pixels, recompute=recompute)[0].square().mean().backward()
        found.append({name: p.grad.clone() for name, p in grown.image_encoder.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, msg=name)


def test_the_encoder_runs_in_half_precision() -> None:
    mine = network()
    pixels = torch.randn(1, 3, 256, 256)
    exact = mine.encode(pixels)[0]
    mine.image_encoder.to(torch.bfloat16)
    rough = mine.encode(pixels.bfloat16())[0].float()
    assert float(F.cosine_similarity(rough.flatten(), exact.flatten(), dim=0)) > 0.999


def test_sensitivities_of_norms_statistics_are_their_gradients() -> None:
    # This encoder joins norms into convolutions by arithmetic that autograd can follow back to the statistics.
    mine = network(replace(SHALLOW, image_size=64)).requires_grad_(True)
    norms = [name for name, m in mine.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    statistics = {f"{n}.{s}": mine.get_buffer(f"{n}.{s}") for n in norms for s in ("running_mean", "running_var")}
    for buffer in statistics.values():
        buffer.requires_grad_(True)
    mine.encode(torch.randn(1, 3, 64, 64))[0].square().mean().backward()
    found = _statistics(mine)
    assert {name for name, _ in found.values()} == statistics.keys()
    for parameter, (name, factor) in found.items():
        given = mine.get_parameter(parameter).grad
        assert given is not None
        torch.testing.assert_close(given * -factor, statistics[name].grad, rtol=1e-3, atol=1e-6, msg=name)
    felt = measure(network(replace(SHALLOW, image_size=64)), pictures=1)
    assert all(felt[name] > 0 for name in statistics)


def test_norms_statistics_are_coded_by_what_pays_and_variances_stay_positive(tmp_path: Path) -> None:
    state = network(SHALLOW).state_dict()
    torch.save(state, tmp_path / "a.pth")
    report = hypersam.compress(tmp_path / "a.pth", tmp_path / "a.hsam", options={"preset": "8x", "fidelity": False})
    coded = {t.name: t.encoding for t in report.tensors}
    assert {coded[n] for n in coded if n.endswith("running_var")} <= {"raw", "half"}
    assert "lattice" in {coded[n] for n in coded if n.endswith("running_mean")}
    assert {coded[n] for n in coded if n.endswith(("num_batches_tracked", "gaussian_matrix"))} == {"raw"}
    back = hypersam.load(tmp_path / "a.hsam").model.network.state_dict()
    for name in (n for n in coded if n.endswith("running_var")):
        assert bool((back[name] > 0).all())
        torch.testing.assert_close(back[name], state[name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("codec", "preset"), [("lattice", "5x"), ("orbit", "8x")])
def test_from_a_checkpoint_to_masks_and_back(tmp_path: Path, codec: str, preset: str) -> None:
    state = network(SHALLOW).state_dict() | {"rpn_head.conv.weight": torch.randn(64, 32, 3, 3)}
    torch.save(state, tmp_path / "a.pth")
    report = hypersam.compress(
        tmp_path / "a.pth", tmp_path / "a.hsam", codec=codec, options={"preset": preset, "fidelity": codec == "lattice"}
    )
    assert report.variant == "edge_sam"
    assert report.fp32_ratio >= float(preset[:-1])
    mine = hypersam.load(tmp_path / "a.hsam")
    mine.set_image(picture(70, 100))
    for prompt in PROMPTS:
        masks, scores, low = mine.predict(**prompt)
        assert (masks.shape, scores.shape, low.shape) == ((3, 70, 100), (3,), (3, 256, 256))
    run_decompress(tmp_path / "a.hsam", tmp_path / "back.pt", as_json=True)
    given = read_checkpoint(tmp_path / "back.pt").tensors
    assert given.keys() == state.keys()
    assert all((given[k].dtype, given[k].shape) == (v.dtype, v.shape) for k, v in state.items())
    for key in (k for k in state if k.endswith("num_batches_tracked")):
        assert torch.equal(given[key], state[key])
