"""GET /docs: the endpoints and their parameters, from the OpenAPI schema, as a page without scripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

router = APIRouter(include_in_schema=False)
_MOST_DEPTH = 4


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Return the reference of the API."""
    return HTMLResponse(reference_page(request.app.openapi()))


def reference_page(schema: Mapping[str, Any]) -> str:
    """Return an OpenAPI schema as HTML."""
    title = escape(f"{schema['info']['title']} {schema['info']['version']}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title></head><body>'
        f"<h1>{title}</h1><p>{escape(schema['info'].get('description', ''))}"
        ' The schema for programs: <a href="/openapi.json">/openapi.json</a>.</p>'
        f"{''.join(_endpoints(schema))}</body></html>"
    )


def _endpoints(schema: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
            for paragraph in operation.get("description", "").split("\n\n"):
                yield f"<p>{escape(paragraph)}</p>"
            content = operation.get("requestBody", {}).get("content", {})
            body = _resolved(schema, content.get("application/json", {}).get("schema", {}))
            rows = [_row(schema, name, field, body.get("required", ())) for name, field in _properties(body)]
            if rows:
                yield f"<table><tr><th>parameter</th><th>type</th><th>default</th></tr>{''.join(rows)}</table>"


def _properties(body: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from body.get("properties", {}).items()


def _row(schema: Mapping[str, Any], name: str, field: Mapping[str, Any], required: Any) -> str:
    default = "required" if name in required else "" if field.get("default") is None else str(field["default"])
    cells = (f"<code>{escape(name)}</code>", escape(_type(schema, field)), escape(default))
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _type(schema: Mapping[str, Any], field: Mapping[str, Any], depth: int = 0) -> str:
    field = _resolved(schema, field)
    if depth > _MOST_DEPTH:
        return "..."
    if "anyOf" in field:
        kinds = [_type(schema, part, depth + 1) for part in field["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in field:
        return " or ".join(map(repr, field["enum"]))
    kind = str(field.get("type", "any"))
    if kind == "array":
        return f"array of {_type(schema, field.get('items', {}), depth + 1)}"
    low, high = field.get("minimum", field.get("exclusiveMinimum")), field.get("maximum")
    bounds = [f"from {low}"] * (low is not None) + [f"to {high}"] * (high is not None)
    return " ".join([kind, *bounds])


def _resolved(schema: Mapping[str, Any], part: Mapping[str, Any]) -> Mapping[str, Any]:
    name = part.get("$ref", "").rpartition("/")[2]
    resolved: Mapping[str, Any] = schema["components"]["schemas"][name] if name else part
    return resolved
