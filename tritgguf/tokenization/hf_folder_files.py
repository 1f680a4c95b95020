"""Tokenizer and generation JSON files of a Hugging Face folder, made from GGUF keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers

from tritgguf.formats.dtypes import shortest_decimal
from tritgguf.tokenization.tokenizer import Tokenizer, stop_ids

# Hugging Face name -> its name in GGUF keys.
_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# Name in generation_config.json -> its name in GGUF keys.
_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


def generation_config(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return generation_config.json: the stop tokens and the sampling options that the file recommends.

    The stop tokens are those of the model's original generation_config.json if the file has them, else those of `run`.
    """
    ids = special_ids(metadata)
    stops = stop_ids(metadata) or sorted(tokenizer.stop_tokens, key=lambda token: (token != tokenizer.eos_id, token))
    config: dict[str, Any] = {f"{name}_token_id": ids[name] for name in ("bos", "pad") if name in ids}
    if stops:
        config["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    for name, key in _SAMPLING.items():
        value = metadata.get(f"general.sampling.{key}")
        if isinstance(value, int | float):
            config |= {"do_sample": True, name: shortest_decimal(value)}
    return config


def tokenizer_config(metadata: Mapping[str, Any], context: int) -> dict[str, Any]:
    """Return tokenizer_config.json for the key tokenizer.huggingface.json; `context` is in tokens."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # transformers may give a missing token a default, so every token is stated.
        **{f"{name}_token": None for name in _SPECIAL_TOKENS},
        **special_tokens(metadata),
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    ids = special_ids(metadata)
    encoded = tokenizers.Tokenizer.from_str(metadata["tokenizer.huggingface.json"]).encode("a").ids
    for name, found in (("bos", encoded[:1]), ("eos", encoded[-1:])):
        is_added = metadata.get(f"tokenizer.ggml.add_{name}_token")
        # If tokenizer.json adds the token itself, the entry would make transformers replace the post-processor.
        if isinstance(is_added, bool) and not (is_added and found == [ids.get(name)]):
            config[f"add_{name}_token"] = is_added
    if isinstance(prefix := metadata.get("tokenizer.ggml.add_space_prefix"), bool):
        config["add_prefix_space"] = prefix
    if template := _chat_template(metadata):
        config["chat_template"] = template
    return config


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return special_tokens_map.json: `bos_token`, `eos_token`, ... -> the token's text."""
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    return {f"{name}_token": tokens[token] for name, token in special_ids(metadata).items() if token < len(tokens)}


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Return `bos`, `eos`, `unk`, `pad` -> token id, for those that the file has."""
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL_TOKENS.items()}
    return {name: token for name, token in ids.items() if type(token) is int and token >= 0}


def _chat_template(metadata: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """Return the chat template, or a list if there are several named ones; None if there is none."""
    template = metadata.get("tokenizer.chat_template")
    names = metadata.get("tokenizer.chat_templates")
    if not names or not isinstance(names, list):
        return template
    named = {"default": template, **{name: metadata.get(f"tokenizer.chat_template.{name}") for name in names}}
    return [{"name": name, "template": text} for name, text in named.items() if text]
