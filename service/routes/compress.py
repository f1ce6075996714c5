"""POST /compress and POST /plan: a checkpoint in, a job out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from hypersam.codecs import CODEC_VERSION
from hypersam.errors import EmptyCheckpoint, InvalidOption, SourceNotAllowed, UploadTooLarge
from hypersam.job_spec import JobSpec
from hypersam.jobs import JobView
from hypersam.options import check_options
from hypersam.sam.registry import known_variants
from hypersam.store import NAME
from service.deps import State, StateDep
from service.errors import RequestError, UnsupportedMedia
from service.multipart import Form, media_type, read_body, read_form
from service.routes.segment_docs import form_of
from service.schemas import CompressFields, CompressRequest, Job
from service.uploads import UploadSink

router = APIRouter(tags=["compress"])

MAX_JSON_BYTES = 1 << 20
_FORM_OVERHEAD = 2 << 20  # boundaries and fields around the file
_NAMED_OPTIONS = ("preset", "target_ratio", "target_mb", "max_error", "policy", "fidelity")
_FIELDS = frozenset(CompressFields.model_fields)
_form_schema = CompressFields.model_json_schema()
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": form_of(
                    {
                        "file": {
                            "type": "string", "format": "binary", "description": ".pth, .pt or .safetensors",
                        },
                        "decoder": {
                            "type": "string", "format": "binary",
                            "description": "prompt encoder and mask decoder, where file is an image encoder alone",
                        },
                        **_form_schema["properties"],
                        "options": {"type": "string", "description": "the codec's options, a JSON object"},
                    },
                    "file",
                )
            },
            "application/json": {"schema": CompressRequest.model_json_schema()},
        },
    }
}  # fmt: skip


@router.post("/compress", status_code=202, response_model=Job, openapi_extra=_BODY)
async def compress(request: Request, response: Response, state: StateDep) -> Job:
    """Take a checkpoint and queue its compression; asking twice for the same gives the same job."""
    return await _queue(request, response, state, dry_run=False)


@router.post("/plan", status_code=202, response_model=Job, openapi_extra=_BODY)
async def plan(request: Request, response: Response, state: StateDep) -> Job:
    """Queue a dry run: the job's result tells the size and the error of every tensor, and no model is made."""
    return await _queue(request, response, state, dry_run=True)


async def _queue(request: Request, response: Response, state: State, *, dry_run: bool) -> Job:
    kind = media_type(request)
    if kind == "multipart/form-data":
        view = await _from_form(request, state, dry_run)
    elif kind == "application/json":
        view = await _from_json(request, state, dry_run)
    else:
        raise UnsupportedMedia("send multipart/form-data with a file, or application/json with a source")
    response.headers["Location"] = f"/jobs/{view.id}"
    return Job.of(view)


async def _from_form(request: Request, state: State, dry_run: bool) -> JobView:
    limit = state.settings.max_upload_bytes
    if int(request.headers.get("content-length", "0")) > 2 * limit + _FORM_OVERHEAD:
        raise UploadTooLarge(f"a checkpoint has more than the {limit} bytes accepted here")
    sink, second = UploadSink(state.store, limit), UploadSink(state.store, limit)
    try:
        form = await read_form(request, {"file": sink, "decoder": second}, _FIELDS)
        if not sink.complete:
            raise EmptyCheckpoint("the form has no file; send the checkpoint as the form field 'file'")
        sent = [each.writer for each in (sink, second) if each.complete]
        state.metrics.uploaded.inc(sum(writer.bytes for writer in sent))
        fields = _fields_of(form)
        names = {field: PurePath(name).name[:255] for field, name in form.filenames.items()}
        decoder = second.writer.digest if second.complete else None
        spec = _spec(fields, sink.writer.digest, decoder, names, dry_run)
        for writer in sent:  # before the queue is locked: it may take long
            await to_thread.run_sync(writer.stage)
        return await _submit(state, spec, lambda: [writer.commit() for writer in sent])
    finally:
        for each in (sink, second):
            await to_thread.run_sync(each.writer.discard)


async def _from_json(request: Request, state: State, dry_run: bool) -> JobView:
    body = await read_body(request, MAX_JSON_BYTES)
    try:
        wanted = CompressRequest.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    source = wanted.source
    if sum(value is not None for value in (source.upload, source.url, source.known)) != 1:
        raise RequestError("source names exactly one of upload, url and known")
    if source.upload is None:
        raise SourceNotAllowed(
            "this service takes checkpoints as uploads only: send the file, or name the sha256 of one that is "
            "held as source.upload"
        )
    digest = source.upload
    spec = _spec(wanted, digest, source.decoder, {}, dry_run)

    def take() -> None:
        for each in spec.uploads:
            state.store.require_upload(each)

    return await _submit(state, spec, take)


async def _submit(state: State, spec: JobSpec, take: Callable[[], object]) -> JobView:
    return await to_thread.run_sync(state.jobs.submit, spec, take)


def _fields_of(form: Form) -> CompressFields:
    values: dict[str, Any] = {key: value for key, value in form.fields.items() if value != ""}
    if "options" in values:
        try:
            values["options"] = json.loads(values["options"])
        except (ValueError, RecursionError) as error:
            raise RequestError(f"options is not a JSON object: {error}") from error
    try:
        return CompressFields.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _spec(fields: CompressFields, digest: str, decoder: str | None, names: Mapping[str, str], dry_run: bool) -> JobSpec:
    """Check everything that can be checked before a worker opens the file. ``names``: what the client calls the files,
    by form field."""
    given = {name: getattr(fields, name) for name in _NAMED_OPTIONS if getattr(fields, name) is not None}
    if twice := sorted(set(given) & set(fields.options)):
        raise InvalidOption(f"{', '.join(twice)} is given twice, as a field and among the options")
    options = check_options(fields.codec, {**fields.options, **given})
    if dry_run and fields.codec == "birkhoff":
        raise InvalidOption("birkhoff decides for each tensor while it encodes; plans are for lattice and orbit")
    if fields.variant is not None and fields.variant not in known_variants():
        raise InvalidOption(f"unknown variant {fields.variant[:64]!r}; known: {', '.join(known_variants())}")
    stem = PurePath(names.get("file", "")).stem
    name = fields.name or (stem if NAME.fullmatch(stem) else digest[:12])
    return JobSpec(
        name=name,
        source_sha256=digest,
        codec=fields.codec,
        codec_version=CODEC_VERSION,
        options=options,
        variant=fields.variant,
        dry_run=dry_run,
        decoder_sha256=decoder,
        file_name=names.get("file") or None,
        decoder_name=names.get("decoder") or None,
    )
