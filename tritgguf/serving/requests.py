"""From a request's parameters to answers that can run, and the common course of both kinds of completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Container, Mapping, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from tritgguf.errors import TritGgufError
from tritgguf.generation.grammar import Grammar
from tritgguf.generation.prompt import chat_tokens
from tritgguf.generation.request import Request as EngineRequest
from tritgguf.generation.request import RunningRequest
from tritgguf.generation.sampling import Sampler, SamplingOptions
from tritgguf.generation.stop_strings import stop_list
from tritgguf.serving.answers import Answer, Piece
from tritgguf.serving.errors import bad_request
from tritgguf.serving.protocol import ChatBody, GenerationBody, TokenizeBody
from tritgguf.serving.responses import (
    ClientGoneError,
    EventStream,
    JsonResponse,
    client_gone_response,
    run_guarded,
)
from tritgguf.serving.service import Service

_SAMPLING_NAMES = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n")
_MOST_ANSWERS = 256
_PENALTY_NAMES = ("presence_penalty", "frequency_penalty")


class Completion(Protocol):
    """What is being answered: its answers, and how their pieces become JSON."""

    answers: Sequence[Answer]

    def events(self) -> AsyncGenerator[Mapping[str, Any], None]:
        """Yield the events of a streamed answer."""

    async def result(self) -> dict[str, Any]:
        """Return the whole answer."""


async def respond(
    service: Service, request: Request, body: GenerationBody, prepare: Callable[[], Completion]
) -> Response:
    """Answer a request: `prepare` runs in another thread, because templates and tokenizers take their time."""
    place = service.take_place()
    try:
        completion = await run_guarded(service.in_thread(request, prepare), request.receive, service)
        if body.stream:
            return EventStream(service, completion.events(), place.release)
        result = await run_guarded(completion.result(), request.receive, service)
    except ClientGoneError:
        place.release()
        return client_gone_response()
    except BaseException:
        place.release()
        raise
    place.release()
    return JsonResponse(result)


def sampling_options(service: Service, body: GenerationBody) -> list[SamplingOptions]:
    """Return the options of each choice; those with a seed differ in it, so that choices differ."""
    options = {name: value for name in _SAMPLING_NAMES if (value := getattr(body, name)) is not None}
    options |= {name: value for name in _PENALTY_NAMES if (value := getattr(body, name))}
    if body.logit_bias:
        options["logit_bias"] = logit_bias(service, body.logit_bias)
    if body.seed is None or body.seed == -1:
        return [SamplingOptions(**options)] * choices_of(body)
    return [SamplingOptions(**options, seed=(body.seed + choice) % 2**64) for choice in range(choices_of(body))]


def choices_of(body: GenerationBody) -> int:
    """Return how many answers each prompt gets."""
    return body.n or 1


def logit_bias(service: Service, given: dict[str, float]) -> dict[int, float]:
    """Return the bias by token; JSON has only texts as keys."""
    size, biases = service.model.engine.model.config.vocab_size, dict[int, float]()
    for text, bias in given.items():
        if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < size):
            raise bad_request(f"logit_bias names token {text!r:.40}, and tokens are 0 to {size - 1}", "logit_bias")
        biases[int(text)] = bias
    return biases


def make_answers(
    service: Service,
    body: GenerationBody,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | None,
    top_logprobs: int | None,
    continues_prompt: bool,
    grammar: Grammar | None = None,
    shown_tokens: Container[int] = (),
) -> list[Answer]:
    """Return the answers to prompts, `n` to each, in OpenAI's order: all of the first prompt, then the second's."""
    if (count := len(prompts) * choices_of(body)) > _MOST_ANSWERS:
        raise bad_request(f"these are {count} answers, and a request has at most {_MOST_ANSWERS}", "n")
    answers, options_of_choices = [], sampling_options(service, body)
    for prompt in prompts:
        for options in options_of_choices:
            constraint = None if grammar is None else grammar.constraint()
            sampler = Sampler(options, constraint=constraint, top_logprobs=top_logprobs)
            answers.append(
                Answer(
                    service.model,
                    prompt,
                    sampler,
                    max_tokens=None if max_tokens == -1 else max_tokens,
                    stop=stop_list(body.stop),
                    ignore_stop_tokens=bool(body.ignore_eos),
                    continues_prompt=continues_prompt,
                    shown_tokens=shown_tokens,
                    cache_prompt=body.cache_prompt is not False,
                    with_logprobs=top_logprobs is not None,
                )
            )
    return answers


def chat_prompt(service: Service, body: ChatBody | TokenizeBody, tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
    """Return the tokens of a chat; TritGgufError as `chat_tokens`."""
    messages = [message.model_dump(exclude_unset=True) for message in body.messages or ()]
    options = body.chat_template_kwargs or None
    return chat_tokens(service.model, messages, tools=tools, template_options=options)


def prompt_of_text(service: Service, text: str, param: str) -> list[int]:
    """Return a text's tokens, control tokens included; 400 for none."""
    tokens = service.model.tokenizer.encode(text, add_special=True, parse_special=True)
    if not tokens:
        raise bad_request(f"{param} is empty; give the model something to continue", param)
    return tokens


def client_errors(call: Callable[[], list[int]], service: Service, param: str) -> list[int]:
    """Return what a call returns; a 400 for any error of the library, because the client's values caused it."""
    try:
        return call()
    except TritGgufError as error:
        public = service.public_error(error)
        raise public if public.status != 500 else bad_request(service.without_paths(str(error)), param) from error


def check_prompt(service: Service, prompt: list[int], param: str) -> None:
    """Raise an ApiError that names a parameter if its prompt is too long or has a token that does not exist."""
    try:
        service.model.engine.check_request(EngineRequest(prompt))
    except TritGgufError as error:
        public = service.public_error(error)
        public.param = param
        raise public from error


def response_id(kind: str) -> str:
    """Return an id that nobody can guess."""
    return f"{kind}-{secrets.token_hex(12)}"


def now() -> int:
    """Return the time in whole seconds since 1970."""
    return int(time.time())


def finish_reason(answer: Answer) -> str:
    """Return why an answer has ended, in OpenAI's words."""
    return "stop" if answer.finish_reason == "stop" else "length"


def usage(answers: Sequence[Answer], choices: int) -> dict[str, Any]:
    """Return the tokens of a request with so many choices for each prompt: each prompt's once, and all generated."""
    firsts = answers[::choices]
    prompt_tokens = sum(len(answer.request.prompt) for answer in firsts)
    completion_tokens = sum(answer.generated for answer in answers)
    cached = sum(answer.running.cached for answer in firsts if answer.running is not None)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def timings(run: RunningRequest | None) -> dict[str, Any]:
    """Return the counts and times of an answer, as llama-server names them."""
    if run is None:
        return {}
    prompt, predicted = run.evaluated_prompt_tokens, len(run.tokens) - run.prompt_length
    prompt_ms, predicted_ms = 1000 * run.prompt_seconds, 1000 * run.decode_seconds
    return {
        "cache_n": run.cached,
        "prompt_n": prompt,
        "prompt_ms": round(prompt_ms, 3),
        "prompt_per_token_ms": round(prompt_ms / prompt, 3) if prompt else 0.0,
        "prompt_per_second": round(1000 * prompt / prompt_ms, 3) if prompt_ms else 0.0,
        "predicted_n": predicted,
        "predicted_ms": round(predicted_ms, 3),
        "predicted_per_token_ms": round(predicted_ms / run.decoded_tokens, 3) if run.decoded_tokens else 0.0,
        "predicted_per_second": round(1000 * run.decoded_tokens / predicted_ms, 3) if predicted_ms else 0.0,
        **({"draft_n": run.drafted_tokens, "draft_n_accepted": run.accepted_tokens} if run.drafted_tokens else {}),
    }


async def collect(service: Service, answers: Sequence[Answer]) -> list[list[Piece]]:
    """Generate answers to their end; return the pieces of each."""
    pieces: list[list[Piece]] = [[] for _ in answers]
    async for number, piece in service.merged(answers):
        if piece is not None:
            pieces[number].append(piece)
    return pieces
