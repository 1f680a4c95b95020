"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from tritgguf.generation.loaded_model import pooled
from tritgguf.generation.request import Request as EngineRequest
from tritgguf.serving.completions import prompts_of
from tritgguf.serving.errors import bad_request
from tritgguf.serving.protocol import EmbeddingBody
from tritgguf.serving.responses import ClientGoneError, JsonResponse, client_gone_response, run_guarded
from tritgguf.serving.service import Service

router = APIRouter(tags=["embeddings"])


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingBody, request: Request) -> Response:
    """Return an embedding of each text: the mean of its final hidden states, with the length 1."""
    service: Service = request.app.state.service
    place = service.take_place()
    try:
        return JsonResponse(await run_guarded(_embed(service, request, body), request.receive, service))
    except ClientGoneError:
        return client_gone_response()
    finally:
        place.release()


async def _embed(service: Service, request: Request, body: EmbeddingBody) -> dict[str, Any]:
    hidden = service.model.engine.model.config.dimensions.hidden
    if body.dimensions not in (None, hidden):
        raise bad_request(f"dimensions must be {hidden}: the model has no embeddings of another size", "dimensions")
    prompts = await service.in_thread(request, lambda: prompts_of(service, body.input, "input"))
    requests = [EngineRequest(prompt, wanted="hidden") for prompt in prompts]
    vectors = await asyncio.gather(*(_embedding(service, engine_request) for engine_request in requests))
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    tokens = sum(map(len, prompts))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": service.alias, "usage": usage}


async def _embedding(service: Service, request: EngineRequest) -> np.ndarray:
    async with service.room:
        running = await service.engine_thread.submit(request).outputs()
    assert running.outputs is not None
    service.totals.add(running)
    return pooled(running.outputs)


def _encoded(vector: np.ndarray, encoding: str | None) -> list[float] | str:
    """Return an embedding as numbers, or as the base64 of its float32 numbers, lowest byte first."""
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    numbers: list[float] = vector.tolist()
    return numbers
