"""Why known families of models are not supported: reasons for the message of a refusal."""

from __future__ import annotations

_REASONS = {
    "qwen3next": "the matrices of its linear attention (Gated DeltaNet) are laid out in another way than Qwen3.5's",
    "llama4": "its text model has chunked attention and experts beside dense layers, which are not supported",
}
"""Beginning of a family's name, in lower case without underscores -> reason."""


def why_not(name: str) -> str | None:
    """Return why a class of config.json or an architecture of a GGUF file is not supported; None if that is unknown."""
    plain = name.lower().replace("_", "")
    return next((reason for beginning, reason in _REASONS.items() if plain.startswith(beginning)), None)
