"""What a check finds: fine, a warning or broken, in words, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Health(StrEnum):
    """How a part is. Only ``BROKEN`` keeps the service from its work."""

    FINE = "fine"
    WARNING = "warning"
    BROKEN = "broken"


@dataclass(frozen=True)
class Finding:
    """What a check found of one part: a sentence, what to do about it, and figures for programs."""

    part: str
    health: Health
    says: str
    todo: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints of it."""
        return {"part": self.part, "health": str(self.health), "says": self.says, "todo": self.todo,
                "facts": dict(self.facts)}  # fmt: skip


def fine(part: str, says: str, **facts: Any) -> Finding:
    """Nothing to do."""
    return Finding(part, Health.FINE, says, None, facts)


def warning(part: str, says: str, todo: str, **facts: Any) -> Finding:
    """The service works, and something should be looked at."""
    return Finding(part, Health.WARNING, says, todo, facts)


def broken(part: str, says: str, todo: str, **facts: Any) -> Finding:
    """The service cannot do its work, or not all of it."""
    return Finding(part, Health.BROKEN, says, todo, facts)
