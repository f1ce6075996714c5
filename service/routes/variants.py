"""What is supported."""

from __future__ import annotations

from fastapi import APIRouter

from hypersam.sam.registry import FAMILIES, VARIANTS
from service.schemas import VariantBody, Variants

router = APIRouter(prefix="/variants", tags=["variants"])


@router.get("", response_model=Variants)
async def list_variants() -> Variants:
    """List the published models that can be compressed, what each can be asked, and where its file is."""
    return Variants(
        variants=[VariantBody.of(row) for row in VARIANTS],
        other_sizes={row.id: row.other_sizes for row in FAMILIES if row.other_sizes},
    )
