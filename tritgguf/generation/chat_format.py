"""How a model writes tool calls and thoughts, as its chat template shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tritgguf.tokenization.tokenizer import Tokenizer

ToolFormat = Literal["hermes", "llama", "mistral", "mistral-args", "harmony"]

_MARKERS: dict[ToolFormat, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]",),
    "mistral-args": ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    "harmony": ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"),
}
_THINK = ("<think>", "</think>")


@dataclass(frozen=True)
class ChatFormat:
    """How a model writes.

    Attributes:
        tools: the form of its tool calls. Hermes: `<tool_call>{"name", "arguments"}</tool_call>`, also Qwen's and
            SmolLM's, and that of models whose template knows no tools. Llama: a bare `{"name", "parameters"}`.
            Mistral: `[TOOL_CALLS][{"name", "arguments"}]`, or `[TOOL_CALLS]name[ARGS]{...}`. Harmony: the channels of
            gpt-oss.
        thinks: whether thoughts stand between `<think>` and `</think>`.

    """

    tools: ToolFormat
    thinks: bool

    @property
    def markers(self) -> tuple[str, ...]:
        """What separates the parts of an answer: control tokens perhaps."""
        return _MARKERS[self.tools] + (_THINK if self.thinks else ())

    def marker_tokens(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Return the tokens that the parser of answers has to see, though they may be control tokens."""
        return frozenset(token for token, added in tokenizer.added_tokens.items() if added.content in self.markers)

    def begins_in_thoughts(self, tokenizer: Tokenizer, prompt: list[int]) -> bool:
        """Tell whether a prompt ends with the mark behind which thoughts begin."""
        last = [tokenizer.vocabulary_entry(token) for token in prompt[-4:]]
        text = "".join(entry for entry in last if entry is not None)
        return self.thinks and text.rstrip("\u010a\u0120\u2581 \n").endswith("<think>")


def chat_format(template: str | None) -> ChatFormat:
    """Return how a model with this chat template writes."""
    template = template or ""
    return ChatFormat(_tool_format(template), "<think>" in template)


def _tool_format(template: str) -> ToolFormat:
    if "<|channel|>" in template:
        return "harmony"
    if "[TOOL_CALLS]" in template:
        return "mistral-args" if "[ARGS]" in template else "mistral"
    if "<tool_call>" in template:
        return "hermes"
    if "<|python_tag|>" in template or ("<|start_header_id|>" in template and "tools" in template):
        return "llama"
    return "hermes"
