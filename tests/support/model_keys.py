"""The configurations of the tiny models and their GGUF metadata, without weights."""

from __future__ import annotations

from typing import Any

from tiny_models import VARIANTS, tiny_config

from tritgguf.architectures import hf_to_gguf


def config_of(variant: str, **changes: Any) -> dict[str, Any]:
    """Return the config.json of a variant of `tiny_models`, with changed entries."""
    arguments = {**VARIANTS[variant], **changes}
    return tiny_config(**{k: v for k, v in arguments.items() if k not in ("dtype", "shards", "seed")})


def values_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return the GGUF metadata for a config.json, key -> value."""
    return {key: value.value for key, value in hf_to_gguf.gguf_metadata(config).items()}
