"""The OpenAPI document, made to say what the service answers: errors are problems, and all references resolve."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from service.errors import PROBLEM_TYPE

_PROBLEM = {"schema": {"$ref": "#/components/schemas/Problem"}}
_OF_THE_FRAMEWORK = ("HTTPValidationError", "ValidationError")


def document_of(app: FastAPI, security: dict[str, Any]) -> dict[str, Any]:
    """Make the document once and keep it, as FastAPI does. ``security``: the security schemes, if there are any."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = made["components"]["schemas"]
        for operations in made["paths"].values():
            for operation in operations.values():
                _hoist(operation, schemas)
                _problems(operation)
        for name in _OF_THE_FRAMEWORK:
            schemas.pop(name, None)
        if security:
            made["components"]["securitySchemes"] = security
            made["security"] = [{name: []} for name in security]
        app.openapi_schema = made
    return app.openapi_schema


def _problems(operation: dict[str, Any]) -> None:
    """Errors leave as problem documents, a request that does not validate among them."""
    operation["responses"].pop("422", None)
    for status, response in operation["responses"].items():
        if status[0] in "45" and "content" in response and status != "503":
            response["content"] = {PROBLEM_TYPE: _PROBLEM}


def _hoist(value: Any, schemas: dict[str, Any]) -> None:
    """Move the ``$defs`` of schemas that were written into a request body to where references find them."""
    if isinstance(value, list):
        for each in value:
            _hoist(each, schemas)
    elif isinstance(value, dict):
        for name, schema in value.pop("$defs", {}).items():
            _hoist(schema, schemas)
            schemas.setdefault(name, schema)
        if isinstance(reference := value.get("$ref"), str):
            value["$ref"] = reference.replace("#/$defs/", "#/components/schemas/")
        for each in value.values():
            _hoist(each, schemas)
