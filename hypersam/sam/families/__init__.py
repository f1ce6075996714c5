"""One module a family; here is the order in which a state dict is held against them."""

from __future__ import annotations

from hypersam.sam.families import edge_sam, efficient_sam, sam2, sam_hq, sam_vit, tiny_vit
from hypersam.sam.family import Family

FAMILIES: tuple[Family, ...] = (
    sam2.FAMILY,
    edge_sam.FAMILY,
    tiny_vit.HQ_FAMILY,
    tiny_vit.FAMILY,
    efficient_sam.FAMILY,
    sam_hq.FAMILY,
    sam_vit.FAMILY,
)
"""The first that recognises a state dict has it."""


def family_of(name: str) -> Family:
    """The family with that id. Raises KeyError."""
    return {family.id: family for family in FAMILIES}[name]
