"""POST /tokenize and /detokenize, GET /tokenizer_info: llama-server's and vLLM's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from tritgguf.serving.errors import bad_request
from tritgguf.serving.protocol import DetokenizeBody, TokenizeBody
from tritgguf.serving.requests import chat_prompt, client_errors
from tritgguf.serving.responses import ClientGoneError, JsonResponse, client_gone_response, run_guarded
from tritgguf.serving.service import Service

router = APIRouter(tags=["tokens"])


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request) -> Response:
    """Return the tokens of a text, or of a chat's messages.

    `content` is llama-server's name: control tokens and BOS only where `add_special` asks for them. `prompt` and
    `messages` are vLLM's: BOS unless `add_special_tokens` is false.
    """
    service: Service = request.app.state.service
    return await _guarded(service, request, lambda: _tokenized(service, body))


def _tokenized(service: Service, body: TokenizeBody) -> Response:
    tokens, texts = _tokens(service, body), service.token_texts
    shown: list[Any] = [{"id": token, "piece": texts.piece(token)} for token in tokens] if body.with_pieces else tokens
    return JsonResponse({"tokens": shown, "count": len(tokens), "max_model_len": service.model.context})


def _tokens(service: Service, body: TokenizeBody) -> list[int]:
    given = [name for name in ("content", "prompt", "messages") if getattr(body, name) is not None]
    if len(given) != 1:
        raise bad_request("give either content, prompt or messages", "content")
    if body.messages is not None:
        return client_errors(lambda: chat_prompt(service, body, body.tools or ()), service, "messages")
    add_special = body.add_special if body.content is not None else body.add_special_tokens is not False
    text = body.content if body.content is not None else body.prompt
    return service.model.tokenizer.encode(text or "", add_special=bool(add_special), parse_special=body.parse_special)


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: Request) -> Response:
    """Return the text of tokens, without control tokens."""
    service: Service = request.app.state.service
    vocabulary = service.model.engine.model.config.vocab_size
    if body.tokens and max(body.tokens) >= vocabulary:
        raise bad_request(f"tokens must be from 0 to {vocabulary - 1}", "tokens")

    def detokenized() -> Response:
        text = service.model.tokenizer.decode(body.tokens)
        return JsonResponse({"content": text, "prompt": text})

    return await _guarded(service, request, detokenized)


async def _guarded(service: Service, request: Request, call: Callable[[], Response]) -> Response:
    try:
        return await run_guarded(service.in_thread(request, call), request.receive, service)
    except ClientGoneError:
        return client_gone_response()


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """Return the tokenizer's special tokens and the chat template."""
    service: Service = request.app.state.service
    tokenizer = service.model.tokenizer
    return JsonResponse(
        {
            "tokenizer_class": "tritgguf",
            "bos_token": tokenizer.bos_token or None,
            "eos_token": tokenizer.eos_token or None,
            "pad_token": None,
            "add_bos_token": tokenizer.add_bos,
            "stop_token_ids": sorted(tokenizer.stop_tokens),
            "vocab_size": service.model.engine.model.config.vocab_size,
            "model_max_length": service.model.context,
            "chat_template": service.model.chat_template,
        }
    )
