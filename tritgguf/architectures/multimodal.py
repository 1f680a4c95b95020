"""The text model inside a multimodal checkpoint: its entries of config.json and its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tritgguf.errors import TritGgufError


@dataclass(frozen=True)
class _TextModel:
    """The class of a text model, and transformers' defaults for entries that checkpoints of this kind leave out."""

    hf_class: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    keeps_sections: bool = False
    """Whether GGUF has the sections of the rotation of images, which do not matter for text."""
    may_transpose_stacks: bool = False
    """Whether the matrices of stacks of experts may be stored transposed, which their shape tells."""


_GEMMA3_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "query_pre_attn_scalar": 256,
}
_QWEN3_VL_DEFAULTS = {"rope_theta": 5e5, "max_position_embeddings": 128000}
_QWEN3_VL_MOE_DEFAULTS = {
    **_QWEN3_VL_DEFAULTS,
    "num_key_value_heads": 16,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
}
_TEXT_MODELS = {
    "Gemma3ForConditionalGeneration": _TextModel("Gemma3ForCausalLM", _GEMMA3_DEFAULTS),
    "Lfm2VlForConditionalGeneration": _TextModel("Lfm2ForCausalLM"),
    "Mistral3ForConditionalGeneration": _TextModel("MistralForCausalLM"),
    "Qwen2_5_VLForConditionalGeneration": _TextModel(
        "Qwen2ForCausalLM", {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_key_value_heads": 8}
    ),
    "Qwen3_5ForConditionalGeneration": _TextModel("Qwen3_5ForCausalLM", keeps_sections=True),
    "Qwen3_5MoeForConditionalGeneration": _TextModel("Qwen3_5MoeForCausalLM", keeps_sections=True),
    "Qwen3VLForConditionalGeneration": _TextModel("Qwen3ForCausalLM", _QWEN3_VL_DEFAULTS),
    "Qwen3VLMoeForConditionalGeneration": _TextModel(
        "Qwen3MoeForCausalLM", _QWEN3_VL_MOE_DEFAULTS, may_transpose_stacks=True
    ),
}
_TEXT_PREFIXES = {"model.language_model.": "model.", "language_model.": ""}
_OTHER_PREFIXES = tuple(
    f"{prefix}{part}." for prefix in ("", "model.") for part in ("vision_tower", "multi_modal_projector", "visual")
)
_ROPE_ENTRIES = ("rope_parameters", "rope_scaling")
_OUTER_ENTRIES = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
IMAGES_LEFT_OUT = "this is a multimodal model; its text model is converted, images are left out"


def text_entries(config: Mapping[str, Any], where: str) -> Mapping[str, Any] | None:
    """Return the config.json of the text model inside a multimodal model; None for any other model.

    Raises TritGgufError if the text model has no entries.
    """
    text_model = _text_model(config)
    if text_model is None:
        return None
    inner = config.get("text_config", config)  # older checkpoints have the entries of the text model beside the others
    if not isinstance(inner, Mapping):
        raise TritGgufError(f"{where}: text_config is {inner!r:.40}, which is no object")
    outer = {entry: config[entry] for entry in _OUTER_ENTRIES if config.get(entry) is not None}
    entries = {**text_model.defaults, **inner, **outer, "architectures": [text_model.hf_class]}
    for entry in _ROPE_ENTRIES:
        if isinstance(entries.get(entry), Mapping) and not text_model.keeps_sections:
            entries[entry] = _without_sections(entries[entry])
    return entries


def may_transpose_stacks(config: Mapping[str, Any]) -> bool:
    """Tell whether a checkpoint with this config.json may have the matrices of its stacks of experts transposed."""
    text_model = _text_model(config)
    return text_model is not None and text_model.may_transpose_stacks


def _text_model(config: Mapping[str, Any]) -> _TextModel | None:
    classes = config.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes and isinstance(classes[0], str) else ""
    return _TEXT_MODELS.get(name)


def text_tensor_name(name: str) -> str | None:
    """Return the name of a multimodal model's tensor in the text model; None for one of other parts."""
    if name.startswith(_OTHER_PREFIXES):
        return None
    for prefix, replacement in _TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def _without_sections(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope entries without those of images: a text's positions are the same in time, height and width."""
    kept = {key: value for key, value in rope.items() if key not in ("mrope_section", "mrope_interleaved")}
    return {key: "default" if value == "mrope" else value for key, value in kept.items()}
