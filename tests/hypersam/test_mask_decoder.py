"""The reordered mask decoder against segment-anything's own classes in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder as OfficialDecoder
from segment_anything.modeling import PromptEncoder as OfficialEncoder
from segment_anything.modeling import TwoWayTransformer as OfficialTransformer
from torch import Tensor, nn

from hypersam.sam.families import mask_decoder as ours
from hypersam.sam.families.decoder import DecoderConfig, mask_decoder, prompt_encoder
from hypersam.sam.network import Prompts
from kernels.codec import BirkhoffConfig, Coded, encode, lattice, orbit
from kernels.hyperlinear import HyperLinear

DIM, GRID = 64, 12
CONFIG = DecoderConfig(DIM, mask_in_chans=16, multimask_outputs=3, depth=2, mlp_dim=96, iou_depth=3, iou_hidden=32)


def pair() -> tuple[ours.MaskDecoder, OfficialDecoder]:
    """Our decoder in fp32 and the official one in float64, of the same weights, biases among them."""
    torch.manual_seed(3)
    made = mask_decoder(CONFIG).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5))
    official = OfficialDecoder(
        transformer_dim=DIM, transformer=OfficialTransformer(2, DIM, 8, 96), iou_head_hidden_dim=32
    )
    official.load_state_dict(made.state_dict())
    return made, official.double().eval()


def question(prompts: int, tokens: int, *, masked: bool) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(prompts + tokens)
    dense = torch.randn(prompts if masked else 1, DIM, GRID if masked else 1, GRID if masked else 1, generator=draw)
    return {
        "embedding": torch.randn(1, DIM, GRID, GRID, generator=draw),
        "positions": torch.randn(1, GRID**2, DIM, generator=draw),
        "sparse": torch.randn(prompts, tokens, DIM, generator=draw),
        "dense": dense.expand(-1, -1, GRID, GRID),
    }


def expected(official: OfficialDecoder, asked: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    wide = {name: t.double() for name, t in asked.items()}
    answer: tuple[Tensor, Tensor] = official.predict_masks(
        image_embeddings=wide["embedding"],
        image_pe=wide["positions"].transpose(1, 2).unflatten(2, (GRID, GRID)),
        sparse_prompt_embeddings=wide["sparse"],
        dense_prompt_embeddings=wide["dense"].expand(len(wide["sparse"]), -1, -1, -1),
    )
    return answer


def off(found: Tensor, true: Tensor) -> float:
    """Largest difference over largest magnitude."""
    return float((found.detach().double() - true.detach()).abs().max() / true.detach().abs().max())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 2, 9, 40])
@pytest.mark.parametrize("prompts", [1, 5])
def test_the_masks_are_the_official_ones(prompts: int, tokens: int, masked: bool) -> None:
    made, official = pair()
    asked = question(prompts, tokens, masked=masked)
    masks, iou = expected(official, asked)
    for which in (slice(None), slice(1), slice(1, None)):
        found, score = made.masks(**asked, which=which)
        assert found.shape == masks[:, which].shape
        assert off(found, masks[:, which]) < 1e-5
        assert off(score, iou[:, which]) < 1e-5


def test_both_orders_of_the_products_are_taken() -> None:
    attention = pair()[0].transformer.final_attn_token_to_image
    assert ours._few(torch.empty(1, 5, DIM), attention, 8)
    assert not ours._few(torch.empty(1, 6, DIM), attention, 8)


def test_channels_last_embeddings_change_nothing() -> None:
    made, _ = pair()
    asked = question(2, 2, masked=False)
    plain, _ = made.masks(**asked, which=slice(None))
    asked["embedding"] = asked["embedding"].to(memory_format=torch.channels_last)
    torch.testing.assert_close(made.masks(**asked, which=slice(None))[0], plain)


def test_gradients_are_the_official_ones() -> None:
    made, official = pair()
    asked = question(3, 2, masked=False)
    made.requires_grad_(True)
    official.requires_grad_(True)
    made.masks(**asked, which=slice(None))[0].square().mean().backward()
    expected(official, asked)[0].square().mean().backward()
    theirs = dict(official.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in theirs.values() if p.grad is not None)
    for name, parameter in made.named_parameters():
        wanted = theirs[name].grad
        if wanted is None:
            assert parameter.grad is None
            continue
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert float((found.double() - wanted).abs().max()) < 1e-5 * largest, name


def coded(weight: Tensor, kind: str) -> Coded:
    if kind == "birkhoff":
        found = encode(weight, BirkhoffConfig(min_elements=1, raw_above=1.0), by_row=True)
        assert isinstance(found, Coded)
        return found
    if kind.startswith("orbit"):
        return orbit.encode(weight, 4, columns=weight.shape[1], rotate=kind == "orbit rotated")
    return lattice.encode(weight, 0.01, columns=weight.shape[1])


@pytest.mark.parametrize("kind", ["lattice", "lattice stream", "orbit", "orbit rotated", "birkhoff"])
def test_compressed_layers_answer_as_what_they_decode_to(kind: str) -> None:
    made, _ = pair()
    dense = copy.deepcopy(made)
    for name, layer in list(made.named_modules()):
        if not isinstance(layer, nn.Linear):
            continue
        compressed = HyperLinear.from_encoded(coded(layer.weight, kind), layer.bias, stream=kind.endswith("stream"))
        parent, _, own = name.rpartition(".")
        setattr(made.get_submodule(parent), own, compressed)
        dense.get_submodule(name).weight.copy_(compressed.dense())
    asked = question(2, 3, masked=False)
    found, score = made.masks(**asked, which=slice(None))
    masks, iou = dense.masks(**asked, which=slice(None))
    assert off(found, masks.double()) < 1e-5
    assert off(score, iou.double()) < 1e-5


def test_blocks_of_pixels_are_transposed_convolutions() -> None:
    torch.manual_seed(0)
    first, second = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ConvTranspose2d(6, 3, 2, stride=2)
    pixels = torch.randn(2, 25, 8)
    up = ours.doubled(second, F.gelu(ours.doubled(first, pixels)))
    true = second(F.gelu(first(pixels.transpose(1, 2).unflatten(2, (5, 5)))))
    torch.testing.assert_close(ours.in_place(up.transpose(1, 2)), true)


def test_positions_are_remembered_until_the_size_changes() -> None:
    encoder = prompt_encoder(CONFIG, grid=GRID, image_size=16 * GRID)
    official = OfficialEncoder(DIM, (GRID, GRID), (16 * GRID, 16 * GRID), 16)
    official.load_state_dict(encoder.state_dict())
    first = encoder.positions()
    torch.testing.assert_close(first, official.get_dense_pe().flatten(2).transpose(1, 2))
    assert encoder.positions() is first
    encoder.image_embedding_size = (6, 6)
    assert encoder.positions().shape == (1, 36, DIM)
    other = prompt_encoder(CONFIG, grid=6, image_size=96)
    encoder.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(encoder.positions(), other.positions())


def test_a_part_of_the_prompts() -> None:
    points = torch.rand(5, 2, 2), torch.ones(5, 2)
    prompts = Prompts(points, torch.rand(5, 4), torch.rand(5, 1, 8, 8))
    some = prompts[1:3]
    assert (prompts.count, some.count) == (5, 2)
    assert some.points is not None
    assert some.boxes is not None
    assert some.masks is not None
    torch.testing.assert_close(some.points[0], points[0][1:3])
    assert Prompts(boxes=torch.rand(3, 4))[2:].count == 1
