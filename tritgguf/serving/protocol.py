"""The bodies of requests: OpenAI's, with the parameters that llama-server and vLLM add.

Parameters that are not listed here are ignored, as OpenAI's server does. Numbers are numbers and not their texts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_MOST_STOPS, _MOST_STOP_CHARACTERS = 16, 1000
_MOST_CHOICES = 128
_MOST_PROMPTS = 256
_MOST_TOOLS = 256
_MOST_TOKENS_OF_A_BODY = 1 << 20
_MOST_LOGPROBS = 20
_INT32, _INT64 = 2**31 - 1, 2**63

TokenId = Annotated[int, Field(ge=0, le=_INT32)]
Tokens = Annotated[list[TokenId], Field(min_length=1, max_length=_MOST_TOKENS_OF_A_BODY)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Stop = Annotated[str, Field(max_length=_MOST_STOP_CHARACTERS)]
Count = Annotated[int, Field(ge=-1, le=_INT32)]


class Body(BaseModel):
    """What all bodies have in common: unknown parameters are ignored, and types are not converted."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool = False


class GenerationBody(Body):
    """Parameters of both kinds of completions."""

    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=_MOST_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-_INT64, le=2 * _INT64 - 1)] | None = None
    temperature: Annotated[Finite, Field(ge=0)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(le=_INT32)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[Finite, Field(gt=0)] | None = None
    repeat_last_n: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    presence_penalty: Finite | None = None
    frequency_penalty: Finite | None = None
    logit_bias: dict[str, Annotated[Finite, Field(ge=-100, le=100)]] | None = None
    max_tokens: Count | None = None
    ignore_eos: bool = False
    cache_prompt: bool = True
    timings_per_token: bool = False
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
    content: str | list[dict[str, Any]] | None = None


class ChatBody(GenerationBody):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=_MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=_MOST_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(GenerationBody):
    """The body of /v1/completions."""

    prompt: str | Tokens | Annotated[list[str | Tokens], Field(min_length=1, max_length=_MOST_PROMPTS)]
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=_MOST_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: str | None = None
    response_format: ResponseFormat | None = None


class EmbeddingBody(Body):
    """The body of /v1/embeddings."""

    input: str | Tokens | Annotated[list[str | Tokens], Field(min_length=1, max_length=_MOST_PROMPTS)]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None


class TokenizeBody(Body):
    """The body of /tokenize: llama-server's `content`, vLLM's `prompt` or `messages`."""

    content: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=_MOST_TOOLS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeBody(Body):
    """The body of /detokenize."""

    tokens: Annotated[list[TokenId], Field(max_length=_MOST_TOKENS_OF_A_BODY)]
