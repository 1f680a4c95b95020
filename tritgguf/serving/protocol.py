"""The bodies of requests: OpenAI's, with the parameters that llama-server and vLLM add.

Parameters that are not listed here are ignored, as OpenAI's server does. Numbers are numbers and not their texts.
Lists are bounded, and the first wrong element ends the check of one: an error for each of millions takes gigabytes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_MOST_STOPS, _MOST_STOP_CHARACTERS = 16, 1000
_MOST_CHOICES = 128
_MOST_PROMPTS = 256
_MOST_TOOLS = 256
_MOST_TOKENS_OF_A_BODY = 1 << 20
_MOST_LOGPROBS = 20
_MOST_MESSAGES, _MOST_PARTS = 10_000, 10_000
_MOST_BIAS = 100
_INT32, _INT64 = 2**31 - 1, 2**63


def _first_wrong_bias(biases: Any) -> Any:
    """Refuse the first wrong bias; pydantic would note an error for each."""
    for token, bias in biases.items() if isinstance(biases, dict) else ():
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not (token.isascii() and is_number and -_MOST_BIAS <= bias <= _MOST_BIAS):
            raise ValueError(f"the bias of token {token[:40]!a} must be a number from -{_MOST_BIAS} to {_MOST_BIAS}")
    return biases


TokenId = Annotated[int, Field(ge=0, le=_INT32)]
Tokens = Annotated[list[TokenId], Field(min_length=1, max_length=_MOST_TOKENS_OF_A_BODY, fail_fast=True)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Stop = Annotated[str, Field(max_length=_MOST_STOP_CHARACTERS)]
Count = Annotated[int, Field(ge=-1, le=_INT32)]
Stops = Annotated[list[Stop], Field(max_length=_MOST_STOPS, fail_fast=True)]
Prompts = Annotated[list[str | Tokens], Field(min_length=1, max_length=_MOST_PROMPTS, fail_fast=True)]
Tools = Annotated[list[dict[str, Any]], Field(max_length=_MOST_TOOLS, fail_fast=True)]
Parts = Annotated[list[dict[str, Any]], Field(max_length=_MOST_PARTS, fail_fast=True)]
Bias = Annotated[Finite, Field(ge=-_MOST_BIAS, le=_MOST_BIAS)]


class Body(BaseModel):
    """What all bodies have in common: unknown parameters are ignored, and types are not converted."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool | None = False


class GenerationBody(Body):
    """Parameters of both kinds of completions."""

    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = 1
    stop: Stop | Stops | None = None
    seed: Annotated[int, Field(ge=-_INT64, le=2 * _INT64 - 1)] | None = None
    temperature: Annotated[Finite, Field(ge=0)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(le=_INT32)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[Finite, Field(gt=0)] | None = None
    repeat_last_n: Count | None = None
    presence_penalty: Finite | None = None
    frequency_penalty: Finite | None = None
    logit_bias: Annotated[dict[str, Bias], BeforeValidator(_first_wrong_bias)] | None = None
    max_tokens: Count | None = None
    ignore_eos: bool | None = False
    cache_prompt: bool | None = True
    timings_per_token: bool | None = False
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None


class JsonSchemaFormat(BaseModel):
    """A named JSON schema."""

    model_config = ConfigDict(extra="ignore")

    name: str = ""
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form that an answer must have."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ChatMessage(BaseModel):
    """A message of a chat; what else it has is for the chat template."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | Parts | None = None


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=_MOST_MESSAGES, fail_fast=True)]


class ChatBody(GenerationBody):
    """The body of /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=_MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(GenerationBody):
    """The body of /v1/completions."""

    prompt: str | Tokens | Prompts
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=_MOST_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: str | None = None
    response_format: ResponseFormat | None = None


class EmbeddingBody(Body):
    """The body of /v1/embeddings."""

    input: str | Tokens | Prompts
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None


class TokenizeBody(Body):
    """The body of /tokenize: llama-server's `content`, vLLM's `prompt` or `messages`."""

    content: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeBody(Body):
    """The body of /detokenize."""

    tokens: Annotated[list[TokenId], Field(max_length=_MOST_TOKENS_OF_A_BODY, fail_fast=True)]
