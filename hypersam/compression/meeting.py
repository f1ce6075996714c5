"""Tensors coded so that a goal is met: the published codec's settings, an error, or a size to the byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from hypersam.allocation import Choice, Curves, smallest_within, solve
from hypersam.compression.job import Job, Progress
from hypersam.encoding import EncodedTensor, encode_all, encode_birkhoff
from hypersam.errors import TargetUnreachable
from hypersam.planning import every_choice, measured_curves, predicted_prefix
from hypersam.reports import fp32_bytes

FIDELITY_BYTES = 1500
"""That the fidelity report takes in the header, about."""

SHORTFALL = 0.003
"""Share of the budget that the first plan leaves, because estimates err by as much."""

ROUNDS = 6
WITHIN = 0.0085
"""Share of the budget that may be left over."""


def curves_of(job: Job, moves: Mapping[str, float]) -> Curves:
    """What each coding of each tensor takes and costs; ``moves``: by how much its error moves the masks."""
    return measured_curves(
        job.tensors, job.roles, job.goal, moves, lambda n, of: job.tell(Progress("planning", n, of))
    )  # fmt: skip


def encode(job: Job, moves: Mapping[str, float], reserve: int) -> dict[str, EncodedTensor]:
    """All tensors coded as the goal wants it; ``reserve``: bytes to leave besides."""
    total = sum(t.nbytes for t in job.tensors.values())

    def told(done: int) -> None:
        # Of a second round nothing shows but that it can be stopped: progress does not go back.
        job.encoded = max(job.encoded, done)
        job.tell(Progress("encoding", job.encoded, total))

    with torch.inference_mode():
        if job.goal.config is not None:
            with job.stage("encoding"):
                return encode_birkhoff(
                    job.tensors, job.goal.config, layers=job.roles.layers, buffers=job.roles.buffers,
                    device=job.device, progress=told,
                )  # fmt: skip
        with job.stage("planning"):
            found = curves_of(job, moves)
        if job.goal.max_error is not None:
            return _within_error(job, found, told)
        return _within_budget(job, found, moves, reserve, told)


def _within_budget(
    job: Job, found: Curves, moves: Mapping[str, float], reserve: int, told: Callable[[int], None]
) -> dict[str, EncodedTensor]:
    """Encode to the size asked for: plan, encode, see what it takes, and plan again with what was learnt."""
    budget = job.goal.budget(fp32_bytes(job.tensors.values()))
    assert budget is not None
    reserve += FIDELITY_BYTES if job.goal.fidelity else 0
    kept = sum(t.nbytes for name, t in job.tensors.items() if name not in found.names)
    aim = (budget - reserve - kept - predicted_prefix(job.tensors, job.header)) * (1 - SHORTFALL)
    choices: dict[str, Choice] = {}
    made: dict[str, EncodedTensor] = {}
    best: dict[str, EncodedTensor] | None = None
    best_size = 0
    for _ in range(ROUNDS):
        with job.stage("planning"):
            wanted = every_choice(job.tensors, solve(found, aim, policy=job.goal.policy))
        with job.stage("encoding"):
            changed = {name: t for name, t in job.tensors.items() if choices.get(name) != wanted[name]}
            fresh = encode_all(changed, wanted, job.roles.layers, progress=told)
            made = {name: fresh.get(name) or made[name] for name in job.tensors}
            choices = wanted
        size = job.prefix_bytes(made, moves, None) + reserve + sum(t.nbytes for t in made.values())
        # The size is below zero where much more was asked for than the tensors take, all of which is then given back.
        if size <= budget and (best is None or best_size < size):
            best, best_size = made, size
        if best is not None and (budget - best_size <= WITHIN * budget or not fresh):
            return best
        # A little less than what is left (or more than what is missing), so that the next size lands below.
        aim += (budget - size) - 0.001 * budget
    if best is None:
        raise TargetUnreachable(f"the artifact takes {size} bytes, and {budget} were asked for")
    return best


def _within_error(job: Job, found: Curves, told: Callable[[int], None]) -> dict[str, EncodedTensor]:
    """Encode to the error asked for; what a sample made look small enough and is not gets a finer coding."""
    limit = job.goal.max_error
    assert limit is not None
    with job.stage("planning"):
        choices = every_choice(job.tensors, smallest_within(found))
    made: dict[str, EncodedTensor] = {}
    wrong = dict(job.tensors)
    with job.stage("encoding"):
        for attempt in range(ROUNDS):
            made |= encode_all(wrong, choices, job.roles.layers, progress=told)
            wrong = {name: t for name, t in job.tensors.items() if _relative_error(made[name]) > limit}
            if not wrong:
                break
            for name in wrong:
                choice = choices[name]
                finer = choice.step is not None and attempt < ROUNDS - 2
                step = None if choice.step is None else choice.step * 0.98 * limit / _relative_error(made[name])
                choices[name] = Choice("lattice", step=step) if finer else Choice("raw")
    return {name: made[name] for name in job.tensors}


def _relative_error(tensor: EncodedTensor) -> float:
    if tensor.signal is None or tensor.error is None or tensor.error == 0:
        return 0.0
    return math.sqrt(tensor.error / tensor.signal) if tensor.signal else math.inf
