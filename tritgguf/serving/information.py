"""What a server says of itself: /v1/models, /health, /props, /slots and /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from tritgguf.generation.sampling import SamplingOptions
from tritgguf.serving.errors import ApiError, shutdown_error
from tritgguf.serving.metrics import CONTENT_TYPE, exposition
from tritgguf.serving.responses import JsonResponse
from tritgguf.serving.service import Service

router = APIRouter(tags=["information"])


@router.get("/health")
@router.get("/v1/health", include_in_schema=False)
async def health(request: Request) -> Response:
    """Tell that the server works; a 503 while it is shutting down."""
    if request.app.state.service.closing:
        raise shutdown_error()
    return JsonResponse({"status": "ok"})


@router.get("/v1/models")
@router.get("/models", include_in_schema=False)
async def models(request: Request) -> Response:
    """List the model."""
    return JsonResponse({"object": "list", "data": [_model(request.app.state.service)]})


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> Response:
    """Describe the model."""
    service: Service = request.app.state.service
    if name != service.alias:
        raise ApiError(404, f"there is no model {name!r:.80}; it is {service.alias}", code="model_not_found")
    return JsonResponse(_model(service))


def _model(service: Service) -> dict[str, Any]:
    config = service.model.engine.model.config
    meta = {
        "n_ctx": service.model.context,
        "n_ctx_train": config.context_length,
        "n_vocab": config.vocab_size,
        "n_embd": config.dimensions.hidden,
        "size": service.file_bytes,
    }
    return {
        "id": service.alias,
        "object": "model",
        "created": service.started,
        "owned_by": "tritgguf",
        "max_model_len": service.model.context,
        "meta": meta,
    }


@router.get("/props")
async def props(request: Request) -> Response:
    """Return the server's settings, as llama-server names them."""
    service: Service = request.app.state.service
    tokenizer = service.model.tokenizer
    defaults = SamplingOptions()
    params = {name: getattr(defaults, name) for name in ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")}
    return JsonResponse(
        {
            "default_generation_settings": {"n_ctx": service.model.context, "params": params},
            "total_slots": service.model.engine.parallel,
            "model_alias": service.alias,
            "model_path": service.alias,
            "modalities": {"vision": False, "audio": False},
            "chat_template": service.model.chat_template or "",
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "build_info": service.fingerprint,
            "is_sleeping": False,
        }
    )


@router.get("/slots")
async def slots(request: Request) -> Response:
    """Return what runs: a slot for each answer that may run at once. Texts are not shown."""
    service: Service = request.app.state.service
    engine = service.model.engine
    busy = {run.sequence: run for run in engine.running}
    shown = []
    for number in range(engine.parallel):
        run = busy.get(number)
        slot: dict[str, Any] = {"id": number, "n_ctx": engine.context, "is_processing": run is not None}
        if run is not None:
            slot |= {
                "n_prompt_tokens": run.prompt_length,
                "n_prompt_tokens_cache": run.cached,
                "n_prompt_tokens_processed": min(run.evaluated, run.prompt_length),
                "next_token": [{"n_decoded": len(run.tokens) - run.prompt_length}],
            }
        shown.append(slot)
    return JsonResponse(shown)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Return counters for Prometheus, as llama-server names them."""
    return Response(exposition(request.app.state.service), media_type=CONTENT_TYPE)
