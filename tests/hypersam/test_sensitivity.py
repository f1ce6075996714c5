from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.random_sam import layout
from hypersam.sam.detect import detect
from hypersam.sam.families.sam_vit import FAMILY, SamViT
from hypersam.sam.model import SamModel
from hypersam.sam.network import sharing
from hypersam.sensitivity import Weights, measure, measure_by_perturbation
from tests.models import TINY, official_sam

ALL = Weights(masks=1, iou=1, embedding=1)


@pytest.fixture(scope="module")
def network() -> SamViT:
    tensors = official_sam(TINY).state_dict()
    tensors = {k: v for k, v in tensors.items() if k not in ("pixel_mean", "pixel_std")}
    return sharing(SamViT, detect(tensors).config, tensors)


def logs(found: dict[str, float], names: list[str]) -> np.ndarray:
    return np.log([found[name] for name in names])


def test_one_backward_pass_finds_what_disturbing_each_tensor_finds(network):
    fast = measure(network, pictures=1, probes=16, side=32, weights=ALL)
    slow = measure_by_perturbation(network, pictures=1, repeats=2, side=32, weights=ALL, relative=0.003)
    assert set(fast) == set(slow) == {name for name, _ in network.named_parameters()}
    # A bias of the keys moves no softmax, so what is measured there is rounding.
    names = [name for name in fast if not name.endswith("k_proj.bias") and fast[name] > 1e-9]
    assert len(names) > 0.9 * len(fast)
    a, b = logs(fast, names), logs(slow, names)
    assert np.corrcoef(a, b)[0, 1] > 0.93
    assert abs(np.median(a - b)) < 0.25
    large = [name for name, p in network.named_parameters() if p.numel() > 1000 and name in names]
    assert np.abs(logs(fast, large) - logs(slow, large)).mean() < 0.35


def test_the_estimate_is_unbiased_for_a_linear_network():
    # f = Wx for one x: ‖J‖² = rows·‖x‖², so the mean squared movement for a unit of squared error is ‖x‖²/n.
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(32, generator=draw)
    weight = torch.zeros(8, 32, requires_grad=True)
    u = torch.randint(0, 2, (8,), generator=draw) * 2.0 - 1
    (weight @ x).backward(u)
    assert float(weight.grad.square().sum()) == pytest.approx(8 * float(x.square().sum()), rel=1e-5)


def test_it_leaves_the_network_as_it_was_and_repeats_itself(network):
    before = {k: v.clone() for k, v in network.state_dict().items()}
    told: list[tuple[int, int]] = []
    first = measure(network, pictures=2, probes=2, seed=3, progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert measure(network, pictures=2, probes=2, seed=3) == first
    assert measure(network, pictures=2, probes=2, seed=4) != first
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())


def test_it_works_where_gradients_are_off(network):
    with torch.inference_mode():
        inside = measure(network, pictures=1)
    assert inside == measure(network, pictures=1)


def test_every_tensor_that_answers_depend_on_is_felt(network):
    found = measure(network, pictures=2)
    still = [name for name, value in found.items() if value == 0]
    assert still == []
    assert all(math.isfinite(value) for value in found.values())


def test_a_reduced_network_ranks_the_tensors_alike(network):
    full = measure(network, pictures=4, probes=4)
    small = measure(network, pictures=4, probes=4, side=32)
    names = [name for name in full if not name.endswith("k_proj.bias")]
    assert np.corrcoef(logs(full, names), logs(small, names))[0, 1] > 0.9


def test_recomputing_activations_changes_nothing(network, monkeypatch):
    kept = measure(network, pictures=1)
    monkeypatch.setattr("hypersam.sensitivity._KEPT_SIDE", 0)
    again = measure(network, pictures=1)
    for name, value in kept.items():
        assert again[name] == pytest.approx(value, rel=1e-3, abs=1e-9)


def test_compressed_layers_are_refused(network):
    other = network.reduced(64)
    changed = sharing(SamViT, other.config, other.state_dict())
    changed.image_encoder.neck = torch.nn.Identity()
    with pytest.raises(ValueError, match="dense"):
        measure(changed)


def test_a_reduced_network_shares_its_layers(network):
    small = network.reduced(32)
    assert small.config.image_size == 32
    assert small.image_encoder.blocks[0].mlp is network.image_encoder.blocks[0].mlp
    assert small.image_encoder.pos_embed.untyped_storage().data_ptr() == (
        network.image_encoder.pos_embed.untyped_storage().data_ptr()
    )
    assert network.config.image_size == 64
    assert network.image_encoder.pos_embed.shape[1] == 8
    model = SamModel(small, variant="sam_vit", device=torch.device("cpu"), dtype=torch.float32)
    embedding = model.embed(np.zeros((20, 32, 3), np.uint8))
    assert embedding.features.shape[-2:] == (4, 4)
    masks, _ = model.decode(embedding, None, torch.tensor([[1.0, 2.0, 10.0, 12.0]]), None, multimask=True)
    assert masks.shape == (1, 3, 16, 16)
    assert network.reduced(64) is network
    for side in (0, 30, 128):
        with pytest.raises(ValueError, match="multiple of 8"):
            network.reduced(side)


def test_the_affordable_side_is_a_window_of_the_published_sizes(network):
    sizes = [detect(layout(f"sam_{size}")).config for size in "blh"]
    assert [FAMILY.on_meta(config).affordable_side() for config in sizes] == [224, 224, 224]
    assert network.affordable_side() == 64
