"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from tritgguf.generation.chat_format import chat_format
from tritgguf.serving.answers import Answer, Piece, PlacedLogprobs
from tritgguf.serving.chat_deltas import ChatDeltas, whole_message
from tritgguf.serving.protocol import ChatBody
from tritgguf.serving.requests import (
    chat_prompt,
    check_prompt,
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
from tritgguf.serving.tool_choice import tool_choice

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
        model, choice = service.model, tool_choice(body)
        prompt = client_errors(lambda: chat_prompt(service, body, choice.tools), service, "messages")
        check_prompt(service, prompt, "messages")
        written = chat_format(model.chat_template)
        in_thoughts = written.begins_in_thoughts(model.tokenizer, prompt)
        if choice.must_call:
            grammar = service.grammars.of_calls(body, choice, written, in_thoughts=in_thoughts)
        else:
            grammar = service.grammars.of_request(body)
        self.answers: Sequence[Answer] = make_answers(
            service,
            body,
            [prompt],
            max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            continues_prompt=False,
            grammar=grammar,
            shown_tokens=written.marker_tokens(model.tokenizer),
        )
        # Where a form is asked for, JSON that looks like a call without its tags is the answer.
        names = [] if grammar is not None else choice.names
        options: dict[str, Any] = {"tools": bool(choice.tools), "names": names, "several": choice.several}
        self._deltas = [ChatDeltas(written, in_thoughts=in_thoughts, **options) for _ in self.answers]

    async def events(self) -> AsyncGenerator[Mapping[str, Any], None]:
        """Yield chunks: the role, the answer as it comes, the reason for the end, and the usage if it is wanted."""
        for index in range(len(self.answers)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async with aclosing(self._service.merged(self.answers)) as pieces:
            async for index, piece in pieces:
                for chunk in self._chunks_of(index, piece):
                    yield chunk
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            whole = usage(self.answers, len(self.answers))
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": whole}

    def _chunks_of(self, index: int, piece: Piece | None) -> Iterator[dict[str, Any]]:
        """Yield the chunks for a piece of an answer, or for its end."""
        answer, deltas = self.answers[index], self._deltas[index]
        if piece is None:
            for delta in deltas.finish():
                yield self._chunk(index, delta)
            yield {**self._chunk(index, {}, self._reason(index)), "timings": timings(answer.running)}
            return
        logprobs = self._logprobs(piece.logprobs)
        for delta in deltas.feed(piece.text) or ([{}] if piece.logprobs else []):
            chunk = self._chunk(index, delta, logprobs=logprobs)
            if self._body.timings_per_token:
                chunk["timings"] = timings(answer.running)
            yield chunk
            logprobs = None  # they are told once

    async def result(self) -> dict[str, Any]:
        """Return the whole answer."""
        pieces = await collect(self._service, self.answers)
        return {
            **self._head("chat.completion"),
            "choices": [self._choice(index, parts) for index, parts in enumerate(pieces)],
            "usage": usage(self.answers, len(self.answers)),
            "timings": timings(self.answers[0].running),
        }

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        deltas = self._deltas[index].feed("".join(piece.text for piece in pieces)) + self._deltas[index].finish()
        logprobs = self._logprobs([placed for piece in pieces for placed in piece.logprobs])
        reason = self._reason(index)
        return {"index": index, "message": whole_message(deltas), "logprobs": logprobs, "finish_reason": reason}

    def _reason(self, index: int) -> str:
        reason = finish_reason(self.answers[index])
        return "tool_calls" if reason == "stop" and self._deltas[index].has_calls else reason

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
