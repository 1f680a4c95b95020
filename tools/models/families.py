"""Compare every supported family with transformers: random weights, converted, run, and compared logit by logit.

    python -m tools.models.families            # the table of docs/families.md
    python -m tools.models.families qwen3 phi3 --json

transformers builds each model from its own configuration class. Weights are drawn so that every part affects the result
(norms away from 1, biases away from 0, activations near 1). Sliding windows are far shorter than the text.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tools import tool_command
from tritgguf.architectures.architecture import Architecture
from tritgguf.architectures.table import ARCHITECTURES
from tritgguf.cli import terminal
from tritgguf.conversion.convert import convert
from tritgguf.evaluation.verify import verify
from tritgguf.reference.model import persistent_buffers, require_torch
from tritgguf.reference.process_settings import silent_transformers

END = "<|endoftext|>"
_SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": None,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + pair / 20 for pair in range(16)],
    "long_factor": [1.5 + 0.75 * pair for pair in range(16)],
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
_GEMMA = {"head_dim": 64, "sliding_window": 48, "query_pre_attn_scalar": 64}
_GRANITE = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.5,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_QWEN35 = {
    "hidden_size": 128,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
}
_LFM2 = {
    "hidden_size": 128,
    "norm_eps": 1e-5,
    "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention", "conv"],
}
_GPT_OSS = {
    "num_experts_per_tok": 4,
    "num_local_experts": 8,
    "intermediate_size": 64,
    "head_dim": 64,
    "sliding_window": 48,
}
_PHIMOE = {
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "intermediate_size": 64,
    "attention_bias": True,
    "lm_head_bias": True,
    "sliding_window": 48,
    "max_position_embeddings": 2048,
    "original_max_position_embeddings": 512,
    "rope_parameters": {**_LONG_ROPE, "short_mscale": 1.25, "long_mscale": 1.25},
}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"head_dim": 32, **_EXPERTS, "num_local_experts": 8}),
    "qwen2-moe": ("qwen2_moe", {**_EXPERTS, "num_experts": 8, "shared_expert_intermediate_size": 128}),
    "qwen3-moe": ("qwen3_moe", {"head_dim": 64, **_EXPERTS, "num_experts": 8, "norm_topk_prob": True}),
    "olmoe": ("olmoe", {**_EXPERTS, "num_experts": 8, "num_key_value_heads": 4}),  # as llama.cpp wants it
    "granite-moe": ("granitemoe", {**_EXPERTS, **_GRANITE, "num_local_experts": 8}),
    "granite-moe, shared expert": (
        "granitemoeshared",
        {**_EXPERTS, **_GRANITE, "num_local_experts": 8, "shared_intermediate_size": 128},
    ),
    "gpt-oss": ("gpt_oss", {**_GPT_OSS, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "phimoe": ("phimoe", _PHIMOE),
    "lfm2-moe": ("lfm2_moe", {**_LFM2, **_EXPERTS, "num_experts": 8, "num_dense_layers": 2}),
    "qwen3.5-moe": (
        "qwen3_5_moe_text",
        {
            **_QWEN35,
            "linear_num_value_heads": 2,  # as many as key heads
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            **_EXPERTS,
            "num_experts": 8,
            "shared_expert_intermediate_size": 128,
            "intermediate_size": None,
        },
    ),
    "gpt-oss, YaRN": ("gpt_oss", {**_GPT_OSS, "rope_parameters": {**_YARN, "truncate": False}}),
}
"""Those of the families below that are mixtures of experts."""
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, linear rope": ("llama", {"rope_parameters": _LINEAR}),
    "llama, YaRN": ("llama", {"rope_parameters": _YARN}),
    "mistral, sliding window": ("mistral", {"sliding_window": 48, "head_dim": 64}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 64}),
    "granite": ("granite", _GRANITE),
    "smollm3": ("smollm3", {"tie_word_embeddings": True}),
    "olmo2": ("olmo2", {}),
    "phi3, sliding window": ("phi3", {"sliding_window": 48}),
    "phi3, short factors": (
        "phi3",
        {"rope_parameters": _LONG_ROPE, "original_max_position_embeddings": 512, "max_position_embeddings": 2048},
    ),
    "phi3, long factors": ("phi3", {"rope_parameters": _LONG_ROPE, "original_max_position_embeddings": 64}),
    "gemma2": ("gemma2", {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", _GEMMA),
    "lfm2": ("lfm2", {**_LFM2, "block_multiple_of": 64}),
    "lfm2, four taps, own head": (
        "lfm2",
        {**_LFM2, "conv_L_cache": 4, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": False},
    ),
    "qwen3.5": ("qwen3_5_text", _QWEN35),
    "gemma3, another scale": ("gemma3_text", {**_GEMMA, "query_pre_attn_scalar": 100}),
    **MIXTURES,
}
"""Name -> transformers' model type, and its configuration entries in addition to `_SIZES`."""


@dataclass(frozen=True)
class Row:
    """One family's result."""

    name: str
    hf_class: str
    gguf_architecture: str
    max_rel_logit_diff: float
    tokens: int


def write_random_family(folder: Path, name: str, seed: int = 0) -> Path:
    """Write a Hugging Face folder of a family with random weights in float16, and return the folder."""
    require_torch()
    import torch
    import transformers

    model_type, entries = FAMILIES[name]
    torch.manual_seed(seed)
    with silent_transformers():
        config = transformers.AutoConfig.for_model(model_type, **{**_SIZES, **entries})
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16)
        for parameter_name, parameter in (*model.named_parameters(), *persistent_buffers(model).items()):
            _draw(parameter_name, parameter, ARCHITECTURES[type(model).__name__])
        model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


def _draw(name: str, parameter: Any, architecture: Architecture) -> None:
    import torch

    with torch.no_grad():
        if parameter.dim() > 1:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            # Some families multiply embeddings with the root of their width; the others need embeddings near 1.
            if "embed_tokens" in name and not architecture.scales_embeddings:
                parameter.mul_(parameter.shape[1] ** 0.5)
            if architecture.has_layer_norms and name.endswith("router.weight"):
                common = torch.randn_like(parameter[0])
                parameter.add_(8 * common * parameter.shape[-1] ** -0.5)  # so that some scores are within the margin
            if architecture.clamped_swiglu and name.endswith("experts.gate_up_proj"):
                parameter.mul_(2.5)  # so that some are clamped
            if architecture.clamped_swiglu and name.endswith("experts.down_proj"):
                parameter.mul_(0.25)
        else:
            offset = 0 if "linear_attn" in name else architecture.norm_offset
            parameter.normal_(1.0 - offset if "norm" in name else 0.0, 0.2)
            if name.endswith("A_log"):
                parameter.sub_(3.0)  # so that a state remembers some ten tokens, not two
            parameter.copy_(parameter.half())  # also what is kept in float32


def write_byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer of the 256 bytes, one merge (llama.cpp wants some) and an end token."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def measure(name: str, folder: Path, *, depth: int = 2, tokens: int = 256) -> Row:
    """Convert a random model of a family in `folder` and return the largest difference of its logits."""
    source = write_random_family(folder / "model", name)
    convert(source, folder / "model.gguf", depth=depth, recipe="published", overwrite=True)
    report = verify(source, folder / "model.gguf", tokens=tokens)
    (hf_class,) = json.loads((source / "config.json").read_text("utf-8"))["architectures"]
    arch = ARCHITECTURES[hf_class].gguf_name
    return Row(name, hf_class, arch, report.max_rel_logit_diff, report.tokens)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Families; all if none.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare the logits of random models of every family with those of transformers."""
    rows = []
    for name in names or FAMILIES:
        if name not in FAMILIES:
            raise typer.BadParameter(f"{name} is none of {', '.join(FAMILIES)}")
        with tempfile.TemporaryDirectory(prefix="tritgguf-") as folder:
            rows.append(measure(name, Path(folder)))
    if as_json:
        terminal.print_json([vars(row) for row in rows])
        return
    print("| family | class | GGUF | largest difference of a logit, relative |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row.name} | {row.hf_class} | {row.gguf_architecture} | {row.max_rel_logit_diff:.1e} |")


if __name__ == "__main__":
    tool_command.run(main)
