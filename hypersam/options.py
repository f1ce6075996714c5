"""What may be asked of a compression, and what follows from it. Checked before a job is queued."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hypersam.allocation import POLICIES, Policy
from hypersam.codecs import CODECS, DEFAULT_PRESETS, PRESETS
from hypersam.errors import InvalidOption
from kernels.codec.types import BirkhoffConfig, shown

MAX_RATIO = 32.0
MAX_NODE_COUNTS = 16

_GOALS = ("preset", "target_ratio", "target_mb", "max_error")
_ALLOCATED = (*_GOALS, "policy", "fidelity")


@dataclass(frozen=True)
class Goal:
    """What a compression is to reach.

    Of ``ratio`` (of the tensors' fp32 size to the whole artifact), ``target_bytes`` (of the artifact) and
    ``max_error`` (‖w − ŵ‖ / ‖w‖ of every tensor, at most) one is set; none for ``birkhoff``, which has its
    ``config`` instead. ``policy``: where bits go, see ``hypersam.allocation``. ``fidelity``: whether the result
    is compared with the original.
    """

    codec: str
    ratio: float | None = None
    target_bytes: int | None = None
    max_error: float | None = None
    policy: Policy = "sensitivity"
    fidelity: bool = True
    config: BirkhoffConfig | None = None

    def budget(self, fp32_bytes: int) -> int | None:
        """Bytes that the artifact of tensors of that size may have; None where an error is asked for."""
        if self.ratio is not None:
            return int(fp32_bytes / self.ratio)
        return self.target_bytes


def check_options(codec: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options of a codec with its defaults filled in, ready for JSON.

    Raises InvalidOption for an unknown codec, an unknown option or a value outside its range.
    """
    if codec not in CODECS:
        raise InvalidOption(f"unknown codec {codec!r}; known: {', '.join(CODECS)}")
    # None in one of these means that nothing was asked for.
    options = {name: v for name, v in (options or {}).items() if v is not None or name not in _ALLOCATED}
    known = _ALLOCATED if codec != "birkhoff" else ("fidelity", *(f.name for f in fields(BirkhoffConfig)))
    if unknown := sorted(set(options) - set(known)):
        named = ", ".join(name[:64] for name in unknown[:5])
        raise InvalidOption(f"{codec} has no option {named}; it has {', '.join(sorted(known))}")
    fidelity = options.pop("fidelity", True)
    if not isinstance(fidelity, bool):
        raise InvalidOption(f"fidelity must be true or false, not {shown(fidelity)}")
    if codec == "birkhoff":
        return {**asdict(_config(options)), "fidelity": fidelity}
    given = [name for name in _GOALS if name in options]
    if len(given) > 1:
        raise InvalidOption(f"give one of {', '.join(_GOALS)}, not {' and '.join(given)}")
    policy = options.get("policy", "sensitivity")
    if policy not in POLICIES:
        raise InvalidOption(f"unknown policy {shown(policy)}; known: {', '.join(POLICIES)}")
    name = given[0] if given else "preset"
    value = options.get(name, DEFAULT_PRESETS[codec])
    return {name: _checked(name, value), "policy": policy, "fidelity": fidelity}


def goal_of(codec: str, options: Mapping[str, Any] | None = None) -> Goal:
    """The goal that options set. Raises InvalidOption like ``check_options``."""
    checked = check_options(codec, options)
    fidelity = checked.pop("fidelity")
    if codec == "birkhoff":
        return Goal(codec, fidelity=fidelity, config=_config(checked))
    ratio = PRESETS[checked["preset"]] if "preset" in checked else checked.get("target_ratio")
    megabytes = checked.get("target_mb")
    target_bytes = None if megabytes is None else int(megabytes * 1e6)
    return Goal(codec, ratio, target_bytes, checked.get("max_error"), checked["policy"], fidelity)


def _checked(name: str, value: Any) -> Any:
    if name == "preset":
        if not isinstance(value, str) or value not in PRESETS:
            raise InvalidOption(f"unknown preset {shown(value)}; known: {', '.join(PRESETS)}")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise InvalidOption(f"{name} must be a number, not {shown(value)}")
    low, high = {"target_ratio": (1.0, MAX_RATIO), "target_mb": (0.0, 1e6), "max_error": (0.0, 1.0)}[name]
    if not low < value <= high:  # compared as it is: a whole number may be too long for a float
        raise InvalidOption(f"{name} must be over {low:g} and at most {high:g}, not {shown(value)}")
    return float(value)


def _config(options: Mapping[str, Any]) -> BirkhoffConfig:
    values = dict(options)
    if "nodes" in values:
        nodes = values["nodes"]
        values["nodes"] = (
            (nodes,) if isinstance(nodes, int) else tuple(nodes) if isinstance(nodes, (list, tuple)) else nodes
        )
    if isinstance(values.get("nodes"), tuple) and len(values["nodes"]) > MAX_NODE_COUNTS:
        raise InvalidOption(f"birkhoff: nodes may name at most {MAX_NODE_COUNTS} node counts")
    try:
        return BirkhoffConfig(**values)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InvalidOption(f"birkhoff: {str(error)[:300]}") from error
