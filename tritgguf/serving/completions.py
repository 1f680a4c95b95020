"""POST /v1/completions: texts go on, and are scored where `echo` asks for log probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from tritgguf.serving.answers import Answer, Piece, PlacedLogprobs
from tritgguf.serving.errors import bad_request
from tritgguf.serving.protocol import CompletionBody
from tritgguf.serving.requests import (
    check_prompt,
    choices_of,
    collect,
    finish_reason,
    make_answers,
    now,
    prompt_of_text,
    respond,
    response_id,
    timings,
    usage,
)
from tritgguf.serving.scored_prompt import ScoredPrompt
from tritgguf.serving.service import Service

router = APIRouter(tags=["completions"])
_DEFAULT_TOKENS = 16  # OpenAI's


@router.post("/v1/completions")
async def completions(body: CompletionBody, request: Request) -> Response:
    """Continue texts, given as such or as token ids."""
    service: Service = request.app.state.service
    return await respond(service, request, body, lambda: Completions(service, body))


def prompts_of(service: Service, given: Any, param: str) -> list[list[int]]:
    """Return the tokens of one prompt or of several, each a text or token ids; ApiError for one that is impossible."""
    several = isinstance(given, list) and not isinstance(given[0], int)
    parts = given if several else [given]
    prompts = [prompt_of_text(service, part, param) if isinstance(part, str) else part for part in parts]
    for prompt in prompts:
        check_prompt(service, prompt, param)
    return prompts


class Completions:
    """The answers to the prompts of one request, `n` for each."""

    def __init__(self, service: Service, body: CompletionBody) -> None:
        """Make the prompts and the answers; ApiError or TritGgufError for impossible values."""
        if body.suffix:
            raise bad_request("suffix is not supported; write the model's own tokens for it into the prompt", "suffix")
        if body.best_of is not None and body.best_of != choices_of(body):
            raise bad_request("best_of must be n: all answers are returned", "best_of")
        self._service, self._body = service, body
        self._id, self._created, self._choices = response_id("cmpl"), now(), choices_of(body)
        prompts = prompts_of(service, body.prompt, "prompt")
        self.answers: Sequence[Answer] = make_answers(
            service,
            body,
            prompts,
            max_tokens=_DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens,
            top_logprobs=body.logprobs,
            continues_prompt=True,
            grammar=service.grammars.of_request(body),
        )
        self._echoes = [ScoredPrompt(service, prompt, body.logprobs) for prompt in prompts] if body.echo else []

    async def events(self) -> AsyncGenerator[Mapping[str, Any], None]:
        """Yield chunks: the prompt if it is wanted, the text as it comes, the reason for the end, and the usage."""
        for echo in self._echoes:
            await echo.score()
        for index in range(len(self.answers)):
            if (scored := self._echo(index)) is not None:
                yield self._chunk(self._choice(index, scored.text, scored.logprobs, None))
        if self._generates:
            async with aclosing(self._service.merged(self.answers)) as pieces:
                async for index, piece in pieces:
                    reason = finish_reason(self.answers[index]) if piece is None else None
                    text, logprobs = (piece.text, piece.logprobs) if piece else ("", self._end_logprobs(index))
                    yield self._chunk(self._choice(index, text, self._behind_echo(index, logprobs), reason))
        else:
            for index in range(len(self.answers)):
                yield self._chunk(self._choice(index, "", [], "length"))
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            yield {**self._chunk(), "usage": self._usage()}

    async def result(self) -> dict[str, Any]:
        """Return the whole answer."""
        await asyncio.gather(*(echo.score() for echo in self._echoes))
        pieces: list[list[Piece]] = [[] for _ in self.answers]
        if self._generates:
            pieces = await collect(self._service, self.answers)
        choices = [self._whole_choice(index, parts) for index, parts in enumerate(pieces)]
        return {**self._chunk(*choices), "usage": self._usage(), "timings": timings(self.answers[0].running)}

    @property
    def _generates(self) -> bool:
        return self._body.max_tokens != 0

    def _echo(self, index: int) -> ScoredPrompt | None:
        return self._echoes[index // self._choices] if self._echoes else None

    def _usage(self) -> dict[str, Any]:
        return usage(self.answers, self._choices)

    def _chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        head = {"id": self._id, "object": "text_completion", "created": self._created, "model": self._service.alias}
        return {**head, "choices": list(choices), "system_fingerprint": self._service.fingerprint}

    def _whole_choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        echo, answer = self._echo(index), self.answers[index]
        text = "".join(piece.text for piece in pieces)
        logprobs = [placed for piece in pieces for placed in piece.logprobs]
        reason = finish_reason(answer) if self._generates else "length"
        if echo is None:
            return self._choice(index, text, logprobs, reason)
        logprobs = [*echo.logprobs, *self._behind_echo(index, [*logprobs, *self._end_logprobs(index)])]
        return self._choice(index, echo.text + text, logprobs, reason)

    def _end_logprobs(self, index: int) -> list[PlacedLogprobs]:
        """Return those of the token that ends an answer behind an echo.

        Who scores a prompt, as lm-eval does, asks for one token behind it and takes the last one away, whatever it is.
        """
        return self.answers[index].end_logprobs if self._echoes else []

    def _behind_echo(self, index: int, logprobs: Sequence[PlacedLogprobs]) -> list[PlacedLogprobs]:
        """Return log probabilities of an answer, placed behind the prompt if the text begins with it."""
        echo = self._echo(index)
        length = len(echo.text) if echo is not None else 0
        return [PlacedLogprobs(placed.logprobs, placed.offset + length) for placed in logprobs]

    def _choice(self, index: int, text: str, logprobs: Sequence[PlacedLogprobs], reason: str | None) -> dict[str, Any]:
        shown = None if self._body.logprobs is None else self._logprobs(logprobs)
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": reason}

    def _logprobs(self, found: Sequence[PlacedLogprobs]) -> dict[str, Any]:
        return self._service.token_texts.completion_logprobs([(placed.logprobs, placed.offset) for placed in found])
