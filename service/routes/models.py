"""The compressed models."""

from __future__ import annotations

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from hypersam.errors import UnknownModel
from hypersam.store import ModelRecord
from service.deps import State, StateDep
from service.errors import RequestError, problem
from service.schemas import Model, Models

router = APIRouter(prefix="/models", tags=["models"])
_BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


class ArtifactFile(FileResponse):
    """A file, or the parts that Range asks for. A range that it has not is refused as all else is, and not in plain
    text, which is the framework's way."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        refusal: Message | None = None

        async def pass_on(message: Message) -> None:
            nonlocal refusal
            if message["type"] == "http.response.start" and message["status"] >= 400:
                refusal = message
            if refusal is None:
                await send(message)

        await super().__call__(scope, receive, pass_on)
        if refusal is None:
            return
        if refusal["status"] == 416:
            size = Headers(raw=refusal["headers"])["content-range"]
            answer = problem(
                416, "range_not_satisfiable", "the file ends before this range", headers={"Content-Range": size}
            )
        else:
            answer = problem(refusal["status"], RequestError.code, "Range names no bytes, as in bytes=0-99")
        await answer(scope, receive, send)


@router.get("", response_model=Models)
async def list_models(state: StateDep) -> Models:
    """List all models by name."""
    records = await to_thread.run_sync(state.store.models)
    return Models(models=[Model.of(record, tensors=False) for record in records])


@router.get("/{model_id}", response_model=Model)
async def get_model(model_id: str, state: StateDep) -> Model:
    """Tell all about a model, the error of each tensor included."""
    return Model.of(await to_thread.run_sync(state.store.model, model_id), tensors=True)


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
    if not path.is_file():
        raise UnknownModel(f"the artifact of {model_id!r} is gone from the data folder")
    return ArtifactFile(
        path,
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
