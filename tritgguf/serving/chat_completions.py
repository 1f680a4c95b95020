"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from tritgguf.generation.prompt import chat_tokens
from tritgguf.serving.answers import Answer, Piece, PlacedLogprobs
from tritgguf.serving.protocol import ChatBody
from tritgguf.serving.requests import (
    client_errors,
    collect,
    finish_reason,
    make_answers,
    now,
    respond,
    response_id,
    timings,
    usage,
)
from tritgguf.serving.service import Service

router = APIRouter(tags=["completions"])


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Answer a chat."""
    service: Service = request.app.state.service
    return await respond(service, request, body, lambda: ChatCompletion(service, body))


class ChatCompletion:
    """The answers to a chat."""

    def __init__(self, service: Service, body: ChatBody) -> None:
        """Make the prompt and the answers; ApiError or TritGgufError for impossible values."""
        self._service, self._body = service, body
        self._id, self._created = response_id("chatcmpl"), now()
        messages: Any = [message.model_dump(exclude_unset=True) for message in body.messages]
        prompt = client_errors(lambda: chat_tokens(service.model, messages), service, "messages")
        top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        self.answers: Sequence[Answer] = make_answers(
            service,
            body,
            [prompt],
            max_tokens=max_tokens,
            top_logprobs=top_logprobs,
            continues_prompt=False,
            grammar=service.grammars.of_request(body),
        )

    async def events(self) -> AsyncGenerator[Mapping[str, Any], None]:
        """Yield chunks: the role, the text as it comes, the reason for the end, and the usage if it is wanted."""
        for index in range(len(self.answers)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async with aclosing(self._service.merged(self.answers)) as pieces:
            async for index, piece in pieces:
                answer = self.answers[index]
                if piece is None:
                    yield {**self._chunk(index, {}, finish_reason(answer)), "timings": timings(answer.running)}
                else:
                    chunk = self._chunk(index, {"content": piece.text}, logprobs=self._logprobs(piece.logprobs))
                    if self._body.timings_per_token:
                        chunk["timings"] = timings(answer.running)
                    yield chunk
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            yield {
                **self._head("chat.completion.chunk"),
                "choices": [],
                "usage": usage(self.answers, len(self.answers)),
            }

    async def result(self) -> dict[str, Any]:
        """Return the whole answer."""
        pieces = await collect(self._service, self.answers)
        choices = [self._choice(index, answer, pieces[index]) for index, answer in enumerate(self.answers)]
        return {
            **self._head("chat.completion"),
            "choices": choices,
            "usage": usage(self.answers, len(self.answers)),
            "timings": timings(self.answers[0].running),
        }

    def _choice(self, index: int, answer: Answer, pieces: Sequence[Piece]) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        logprobs = self._logprobs([placed for piece in pieces for placed in piece.logprobs])
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason(answer)}

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._service.alias,
            "system_fingerprint": self._service.fingerprint,
        }

    def _logprobs(self, found: Sequence[PlacedLogprobs]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        texts = self._service.token_texts
        return {"content": [texts.chat_logprobs(placed.logprobs) for placed in found], "refusal": None}
