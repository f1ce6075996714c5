"""The compressed models."""

from __future__ import annotations

import os

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from hypersam.errors import UnknownModel
from hypersam.store import ModelRecord
from service.deps import State, StateDep
from service.ranges import RangedFile
from service.schemas import Model, Models

router = APIRouter(prefix="/models", tags=["models"])
_BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


@router.get("", response_model=Models)
async def list_models(state: StateDep) -> Models:
    """List all models by name."""
    records = await to_thread.run_sync(state.store.models)
    return Models(models=[Model.of(record, tensors=False) for record in records])


@router.get("/{model_id}", response_model=Model)
async def get_model(model_id: str, state: StateDep) -> Model:
    """Tell all about a model, the error of each tensor included."""
    return Model.of(await to_thread.run_sync(state.store.model, model_id), tensors=True)


@router.head(
    "/{model_id}/artifact",
    operation_id="head_artifact",
    response_class=FileResponse,
    responses={200: {"content": _BYTES}, 304: {"description": "as for GET"}},
)
@router.get(
    "/{model_id}/artifact",
    response_class=FileResponse,
    responses={
        200: {"content": _BYTES},
        206: {
            "description": "the part that Range asked for, or several",
            "content": {**_BYTES, "multipart/byteranges": {"schema": {"type": "string", "format": "binary"}}},
        },
        304: {"description": "the artifact is the one that If-None-Match names"},
    },
)
async def get_artifact(model_id: str, request: Request, state: StateDep) -> Response:
    """Send the compressed file. Its ETag is its sha256; Range works."""
    record = await to_thread.run_sync(state.store.model, model_id)
    etag = f'"{record.digest}"'
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if etag in known or "*" in known:
        return Response(status_code=304, headers={"ETag": etag})
    path = await to_thread.run_sync(state.store.artifact, record)
    try:
        found = await to_thread.run_sync(os.stat, path)
    except FileNotFoundError:
        raise UnknownModel(f"the artifact of {model_id!r} is gone from the data folder") from None
    return RangedFile(
        path,
        found,
        media_type="application/octet-stream",
        filename=f"{record.name}.hsam",
        headers={"ETag": etag, "Cache-Control": "no-cache"},
    )


@router.delete("/{model_id}", status_code=204, response_class=Response)
async def delete_model(model_id: str, state: StateDep) -> None:
    """Forget a model; its artifact goes unless another name stands for it."""
    record = await to_thread.run_sync(state.store.remove, model_id)
    if not await to_thread.run_sync(_still_used, state, record):
        state.engine.forget(record.digest)
    state.engine.forget_name(model_id)
    state.metrics.forget(model_id)


def _still_used(state: State, record: ModelRecord) -> bool:
    return any(other.digest == record.digest for other in state.store.models())
