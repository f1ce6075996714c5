"""Whatever number is given as an option: it is refused at once, or the codec takes it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import hypersam
from hypersam.errors import InvalidOption, TargetUnreachable
from hypersam.options import MAX_RATIO, check_options, goal_of
from kernels.codec import decode, encode
from tests.models import save_checkpoint

ODD: tuple[Any, ...] = (
    0, -0.0, -1, 1, True, 5e-324, 2.3e-308, 1e-45, 1e-38, 1e-30, 1e30, 1e31, 3.5e38, 1e308, 1.7976931348623157e308,
    2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 10**22, 10**30, 10**308, 10**309, 10**5000, -(10**5000), math.inf,
    -math.inf, math.nan, "1", "", None, [], [1], {}, [10**22], [10**5000], [1e300], [True], [[4]],
)  # fmt: skip
NUMBERS = st.one_of(st.sampled_from(ODD), st.floats(), st.integers(), st.integers(1, 1 << 70))
SQUARES = st.one_of(NUMBERS, st.integers(1, 200).map(lambda n: n * n))
BIRKHOFF = st.fixed_dictionaries({}, optional={
    "side": NUMBERS, "target_error": NUMBERS, "raw_above": NUMBERS, "min_elements": NUMBERS,
    "max_classes": st.one_of(NUMBERS, st.integers(1, 20)),
    "nodes": st.one_of(SQUARES, st.lists(SQUARES, max_size=3)),
})  # fmt: skip
WEIGHT = torch.linspace(-1, 1, 24).reshape(4, 6) ** 3


def accepted(codec: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """The options as a job has them, or None where they are refused."""
    try:
        checked = check_options(codec, options)
    except InvalidOption:
        return None
    stored: dict[str, Any] = json.loads(json.dumps(checked, allow_nan=False))
    assert check_options(codec, stored) == checked
    return stored


@settings(max_examples=300, deadline=None)
@given(BIRKHOFF)
@example({"side": 10**22})
@example({"side": 1e-30})
@example({"side": 1e30, "raw_above": 1e308})
@example({"nodes": 10**5000})
@example({"max_classes": 10**5000})
@example({"target_error": 5e-324, "raw_above": 10**308, "min_elements": 1, "nodes": [1]})
def test_options_of_birkhoff(options: dict[str, Any]) -> None:
    """Any combination, with an encoder that is really run."""
    checked = accepted("birkhoff", options)
    if checked is None:
        return
    config = goal_of("birkhoff", checked).config
    assert config is not None
    for by_row in (True, False):
        assert decode(encode(WEIGHT, config, by_row=by_row)).isfinite().all()


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["lattice", "orbit"]), st.sampled_from(["target_ratio", "target_mb", "max_error"]), NUMBERS)
@example("lattice", "target_mb", 10**5000)
@example("orbit", "target_ratio", [10**5000])
def test_goals_of_the_other_codecs(codec: str, name: str, value: Any) -> None:
    checked = accepted(codec, {name: value})
    if checked is None or value is None:
        return
    goal = goal_of(codec, checked)
    budget = goal.budget(1 << 40)
    assert (goal.max_error is not None and 0 < goal.max_error <= 1) or (budget is not None and 0 <= budget <= 1 << 40)
    assert goal.ratio is None or 1 < goal.ratio <= MAX_RATIO


@pytest.mark.parametrize("codec", ["lattice", "orbit"])
def test_goals_at_their_ends(tmp_path_factory: pytest.TempPathFactory, codec: str) -> None:
    """The least and the most of each is met, or said to be out of reach."""
    folder = tmp_path_factory.mktemp("ends")
    source = save_checkpoint(folder / "tiny.pth")
    for goal in ({"max_error": 5e-324}, {"max_error": 1.0}, {"target_mb": 5e-324}, {"target_mb": 1e6},
                 {"target_ratio": 1 + 2**-52}, {"target_ratio": MAX_RATIO}):  # fmt: skip
        options = {**goal, "policy": "equal_error", "fidelity": False}
        try:
            report = hypersam.compress(source, folder / "a.hsam", codec=codec, options=options)
            assert report.artifact_bytes > 0
        except TargetUnreachable:
            assert goal in ({"target_mb": 5e-324}, {"target_ratio": MAX_RATIO})
