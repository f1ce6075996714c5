from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypersam.allocation import (
    POLICIES,
    WORST_RELATIVE_ERROR,
    Choice,
    Cost,
    Curves,
    TensorFacts,
    curves,
    smallest_within,
    solve,
)
from hypersam.errors import InvalidOption

RAW, HALF = Choice("raw"), Choice("half")


def gaussian(tensor: TensorFacts, choice: Choice) -> Cost:
    """Rate and distortion of ideally coded Gaussian weights; Δ²/12 up to what leaving all out costs."""
    n, variance = tensor.elements, tensor.energy / tensor.elements
    match choice:
        case Choice("raw"):
            return Cost(32.0 * n, 0.0)
        case Choice("half"):
            return Cost(16.0 * n, 2.0**-23 * tensor.energy)
        case Choice("orbit", k=int(k)):
            return Cost(n * k + 100, n * variance * 2.0 ** (-2 * k) * 2)
    assert choice.step is not None
    error = 1 / (1 / variance + 12 / choice.step**2)
    return Cost(0.5 * n * math.log2(1 + 12 * variance / choice.step**2) + 80, n * error)


def facts(count: int = 12, *, seed: int = 0, **other: object) -> list[TensorFacts]:
    rng = np.random.default_rng(seed)
    return [
        TensorFacts(f"t{i}", n := int(rng.integers(200, 60_000)), n * float(rng.lognormal(-6, 1)),
                    float(rng.lognormal(0, 3)), **other)  # type: ignore[arg-type]
        for i in range(count)
    ]  # fmt: skip


def size(tensors: list[TensorFacts], bits: float) -> float:
    return sum(t.elements for t in tensors) * bits / 8


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("bits", [2.0, 4.0, 6.5])
def test_every_policy_ends_just_below_the_budget(policy, bits):
    tensors = facts()
    plan = solve(curves(tensors, gaussian), size(tensors, bits), policy=policy)
    assert 0.995 * size(tensors, bits) <= plan.total_bytes <= size(tensors, bits)
    assert plan.policy == policy
    assert set(plan.choices) == {t.name for t in tensors}


def test_promises_are_what_the_estimate_says_of_the_chosen_coding():
    tensors = facts()
    plan = solve(curves(tensors, gaussian), size(tensors, 4))
    for tensor in tensors:
        cost = gaussian(tensor, plan.choices[tensor.name])
        assert plan.nbytes[tensor.name] * 8 == pytest.approx(cost.bits, rel=2e-3)
        assert plan.squared_error[tensor.name] == pytest.approx(cost.squared_error, rel=5e-3)


def test_steps_go_with_the_inverse_root_of_the_sensitivity():
    tensors = [TensorFacts(f"t{i}", 10_000, 100.0, 4.0**i, ()) for i in range(4)]
    plan = solve(curves(tensors, gaussian), size(tensors, 6))
    steps = [plan.choices[t.name].step for t in tensors]
    for a, b in itertools.pairwise(steps):
        assert a / b == pytest.approx(2, rel=0.05)


def test_sensitivity_moves_the_output_least_of_all_policies():
    tensors = facts(20, discrete=(RAW, HALF, *(Choice("orbit", k=k) for k in (3, 4, 5, 6))))
    found = curves(tensors, gaussian)
    moved = {policy: solve(found, size(tensors, 4), policy=policy).movement for policy in POLICIES}
    assert moved["sensitivity"] < 0.5 * min(moved["equal_error"], moved["equal_bits"])


def test_it_is_as_good_as_trying_everything():
    orbits = tuple(Choice("orbit", k=k) for k in (3, 4, 5, 6))
    tensors = [TensorFacts(f"t{i}", 1000 * (i + 1), 10.0 * (i + 1), 10.0**-i, orbits, lattice=False) for i in range(4)]
    budget = size(tensors, 4.3)
    plan = solve(curves(tensors, gaussian), budget)
    best = math.inf
    for code in range(4**4):
        costs = [gaussian(t, Choice("orbit", k=3 + code // 4**i % 4)) for i, t in enumerate(tensors)]
        if sum(c.bits for c in costs) <= 8 * budget:
            best = min(best, sum(c.squared_error * t.sensitivity for c, t in zip(costs, tensors, strict=True)))
    assert plan.movement <= 1.25 * best


def test_equal_error_gives_equal_errors():
    tensors = facts(discrete=())
    plan = solve(curves(tensors, gaussian), size(tensors, 4), policy="equal_error")
    relative = [math.sqrt(plan.squared_error[t.name] / t.energy) for t in tensors]
    assert max(relative) / min(relative) < 1.05


def test_equal_bits_gives_equal_bits():
    tensors = facts(discrete=())
    plan = solve(curves(tensors, gaussian), size(tensors, 4), policy="equal_bits")
    bits = [8 * plan.nbytes[t.name] / t.elements for t in tensors]
    assert max(bits) - min(bits) < 0.1


@pytest.mark.parametrize("limit", [0.3, 0.03, 0.001])
def test_max_error_holds_for_every_tensor(limit):
    tensors = facts()
    plan = smallest_within(curves(tensors, gaussian, max_error=limit))
    for tensor in tensors:
        relative = math.sqrt(gaussian(tensor, plan.choices[tensor.name]).squared_error / tensor.energy)
        assert relative <= limit * 1.005
        assert relative >= 0.9 * limit or plan.choices[tensor.name].encoding != "lattice"


def test_too_small_a_budget_names_the_least():
    tensors = facts()
    found = curves(tensors, gaussian)
    least = sum(found.bits.min(axis=1)) / 8
    with pytest.raises(InvalidOption, match=f"{least:.0f}"):
        solve(found, least * 0.9)


def test_an_error_nobody_keeps_is_named():
    with pytest.raises(InvalidOption, match="t0"):
        curves(facts(1, discrete=()), gaussian, max_error=1e-9)


def test_a_generous_budget_stores_everything_as_it_is():
    tensors = facts(3)
    plan = solve(curves(tensors, gaussian), size(tensors, 40))
    assert set(plan.choices.values()) == {RAW}


def test_tensors_without_sensitivity_or_without_effect_are_still_coded_with_care():
    tensors = [
        TensorFacts("known", 10_000, 100.0, 2.0),
        TensorFacts("unknown", 10_000, 100.0, None),
        TensorFacts("nothing", 10_000, 100.0, 0.0),
        TensorFacts("zeros", 10_000, 0.0, 1.0),
    ]
    plan = solve(curves(tensors, lambda t, c: gaussian(t, c) if t.energy else Cost(80, 0.0)), size(tensors, 4))
    known, unknown = plan.choices["known"].step, plan.choices["unknown"].step
    assert known is not None
    assert unknown == pytest.approx(known, rel=0.02)  # what was left of the budget may go to either
    assert plan.nbytes["nothing"] < plan.nbytes["known"]
    assert plan.squared_error["zeros"] == 0


def test_what_seems_to_move_nothing_is_spared_the_worst_while_there_is_room():
    tensors = [TensorFacts("felt", 10_000, 100.0, 1.0, ()), TensorFacts("unfelt", 10_000, 100.0, 0.0, ())]
    found = curves(tensors, gaussian)
    roomy, tight = (solve(found, size(tensors, bits)) for bits in (4, 1.5))
    assert roomy.squared_error["unfelt"] == pytest.approx((WORST_RELATIVE_ERROR * 10) ** 2, rel=0.05)
    assert tight.squared_error["unfelt"] > (WORST_RELATIVE_ERROR * 10) ** 2


def test_curves_measured_apart_are_joined():
    tensors = [*facts(3), TensorFacts("few", 100, 1.0, 1.0, (RAW,), lattice=False)]
    together = curves(tensors, gaussian)
    joined = Curves.joined([curves([t], gaussian) for t in tensors])
    assert joined.names == {t.name for t in tensors}
    assert np.array_equal(joined.bits, together.bits)
    assert solve(joined, size(tensors, 5)) == solve(together, size(tensors, 5))


def test_a_choice_has_what_its_coding_needs_and_no_more():
    with pytest.raises(ValueError, match="step"):
        Choice("lattice")
    with pytest.raises(ValueError, match="step"):
        Choice("raw", step=1.0)
    with pytest.raises(ValueError, match="no candidate"):
        TensorFacts("t", 10, 1.0, None, (), lattice=False)
    with pytest.raises(InvalidOption, match="unknown policy"):
        solve(curves(facts(1), gaussian), 1e9, policy="best")  # type: ignore[arg-type]


def test_no_tensors_need_no_bytes():
    assert solve(curves([], gaussian), 0).total_bytes == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 9), bits=st.floats(1.5, 20), policy=st.sampled_from(POLICIES))
def test_the_budget_is_never_exceeded(seed, count, bits, policy):
    tensors = facts(count, seed=seed)
    found = curves(tensors, gaussian)
    plan = solve(found, size(tensors, bits) + 1000, policy=policy)
    assert plan.total_bytes <= size(tensors, bits) + 1000
    if policy == "sensitivity" and bits >= 2:  # below, the bound on relative errors is given up
        richer = solve(found, 1.2 * size(tensors, bits) + 1000, policy=policy)
        assert richer.movement <= plan.movement * 1.001
