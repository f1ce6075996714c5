"""Which model a state dict is, from keys and shapes alone; a name or a hash decides between models of one layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from hypersam.errors import LayoutMismatch, UnknownFamily, VariantMismatch
from hypersam.sam import registry
from hypersam.sam.families import FAMILIES, family_of
from hypersam.sam.family import Family
from hypersam.sam.network import Config
from hypersam.sam.registry import VARIANTS, known_variants, named_by

_SHOWN = 8

DecidedBy = Literal["shapes", "caller", "files", "sha256", "name", "order"]
"""What told the variant from its candidates; ``files``: that it came as two; ``order``: nothing did, and the first was
taken."""


@dataclass(frozen=True)
class Detected:
    """A recognised model: its family, variant, the variants it could also be, what decided, and its configuration."""

    family: str
    variant: str
    candidates: tuple[str, ...]
    decided_by: DecidedBy
    config: Config

    @property
    def described(self) -> Family:
        """What its family is made of."""
        return family_of(self.family)

    @property
    def doubts(self) -> tuple[str, ...]:
        """What a report says where nothing decided; else nothing."""
        return doubts_of(self.variant, self.candidates, self.decided_by)

    def told(self, *, sha256: str | None = None, name: str | None = None, two_files: bool = False) -> Detected:
        """The same where the shapes and the caller did not decide: by its coming as two files, by the hash of the file,
        or else by its name."""
        if self.decided_by in ("shapes", "caller"):
            return self
        rows = [v for v in VARIANTS if v.id in self.candidates]
        if two_files and (published := [row for row in rows if row.two_files]):
            return replace(self, variant=published[0].id, decided_by="files")
        for row in rows:
            if sha256 is not None and row.sha256 == sha256:
                return replace(self, variant=row.id, decided_by="sha256")
        named = [row for row in named_by(name or "") if row.id in self.candidates]
        return replace(self, variant=named[0].id, decided_by="name") if named else self


def detect(tensors: Mapping[str, Tensor], *, variant: str | None = None, name: str | None = None) -> Detected:
    """Recognise a state dict and check that every key and shape is as the model expects.

    ``variant`` is what the caller says it is, ``name`` the file's. Raises UnknownFamily, LayoutMismatch or
    VariantMismatch.
    """
    if variant is not None and variant not in known_variants():
        raise VariantMismatch(f"unknown variant {variant!r}; known are {', '.join(known_variants())}")
    if half := _half(tensors):
        raise UnknownFamily(half)
    family = next((f for f in FAMILIES if f.recognises(tensors)), None)
    if family is None:
        keys = ", ".join(sorted(tensors)[:3])
        raise UnknownFamily(f"no known Segment Anything model: its keys begin with {keys} …; {_known()}")
    config = family.read(tensors)
    check_layout(tensors, family, config)
    found = tuple(
        v.id for v in VARIANTS
        if v.family == family.id and all(getattr(config, mark) == value for mark, value in v.marks)
    )  # fmt: skip
    candidates = found or (family.id,)
    # Whoever asks for the family as such gets it, of whatever size.
    if variant is not None and variant not in (*candidates, family.id):
        raise VariantMismatch(f"the checkpoint is {' or '.join(candidates)} by its shapes, not {variant}")
    if variant is not None:
        return Detected(family.id, variant, candidates, "caller", config)
    decided: DecidedBy = "shapes" if len(candidates) == 1 else "order"
    return Detected(family.id, candidates[0], candidates, decided, config).told(name=name)


def doubts_of(variant: str, candidates: tuple[str, ...], decided_by: str) -> tuple[str, ...]:
    """What to say of a variant that was taken because it is the first of its ``candidates``; else nothing."""
    others = [name for name in candidates if name != variant]
    if decided_by != "order" or not others:
        return ()
    files = [row.file for row in VARIANTS if row.id in candidates]
    return (
        f"the variant {variant} is a guess: by its shapes the checkpoint may as well be {' or '.join(others)}, and "
        f"neither its hash nor its file's name tells; say which with variant (--variant {others[0]}), or give the file "
        f"the name under which it is published ({', '.join(files)})",
    )


def _half(tensors: Mapping[str, Tensor]) -> str | None:
    """What to say of one of the two files of a model that is published as two."""
    if tensors and all(key.startswith(("prompt_encoder.", "mask_decoder.")) for key in tensors):
        return "this is a decoder alone; give the image encoder as the checkpoint, and this as its decoder"
    prefixed = all(key.startswith("image_encoder.") for key in tensors)
    encoder = tensors if prefixed else {f"image_encoder.{key}": value for key, value in tensors.items()}
    if any(family.recognises(encoder) for family in FAMILIES):
        return "this is an image encoder alone; give the file of its prompt encoder and mask decoder as its decoder too"
    return None


def check_layout(tensors: Mapping[str, Tensor], family: Family, config: Config) -> None:
    """Raise LayoutMismatch unless the keys, shapes and kinds of number are those of the model, or are carried by it."""
    try:
        expected = family.on_meta(config).state_dict()
    except RuntimeError as error:  # a side of petabytes, which a tensor without values can have
        first = str(error).splitlines()[0]
        raise LayoutMismatch(f"the state dict's shapes are those of no network: {first[:200]}") from error
    problems = []
    if missing := [key for key in expected if key not in tensors]:
        problems.append(f"missing: {_some(missing)}")
    if unexpected := [key for key in tensors if key not in expected and not family.carries(key)]:
        problems.append(f"unexpected: {_some(unexpected)}")
    both = [(key, tensors[key], value) for key, value in expected.items() if key in tensors]
    wrong = [f"{key} is {tuple(t.shape)}, should be {tuple(e.shape)}" for key, t, e in both if t.shape != e.shape]
    if wrong:
        problems.append(f"of another shape: {_some(wrong)}")
    odd = [f"{key} is {t.dtype}" for key, t, e in both if t.is_floating_point() != e.is_floating_point()]
    if odd:
        problems.append(f"whole numbers instead of floating ones, or the reverse: {_some(odd)}")
    if problems:
        title = registry.family_row(family.id).title
        raise LayoutMismatch(f"the state dict does not fit its family ({title}); " + "; ".join(problems))


def _known() -> str:
    titles = [v.title for v in VARIANTS] + [row.other_sizes for row in registry.FAMILIES if row.other_sizes]
    return f"known are {', '.join(titles)}"


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
