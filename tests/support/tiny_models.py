"""Tiny Hugging Face folders with random weights, written without torch in a few milliseconds each.

`VARIANTS` has one model for each difference between architectures and checkpoints; `write_tiny_model` writes one of
them. All dimensions are multiples of 64 except in `unaligned`. The same seed gives the same bytes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PADDED_VOCABULARY = 448

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")
_TEXT = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "A model reads text as tokens; each token stands for a few letters of the text.",
    "Name three primary colors: red, blue and yellow. There are 12 months in a year, 365 days.",
    "def reverse(text):\n    return text[::-1]\n\nfor number in range(10):\n    print(number, number * 2)\n",
    "Weights are sums of ternary digits, and a ternary digit is minus one, zero or one.",
)

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# Keyword arguments of write_tiny_model; entries of config.json are written unchanged.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True, "dtype": "BF16"},
    "llama-no-gqa": {"num_key_value_heads": 4, "dtype": "F32"},
    "llama-biases": {"attention_bias": True},
    "llama-sharded": {"shards": 3},
    "llama-sentencepiece": {"tokenizer": "sentencepiece"},
    "llama3-rope": {"rope_theta": 500000.0, "rope_scaling": _LLAMA3_ROPE, "tokenizer": "llama-bpe"},
    "linear-rope": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "yarn-rope": {
        "rope_parameters": {
            "rope_theta": 10000.0,
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral": {
        "architecture": "MistralForCausalLM",
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "head_dim": 64,
        "sliding_window": None,
        "dtype": "BF16",
        "tokenizer": "sentencepiece",
    },
    "qwen2": {"architecture": "Qwen2ForCausalLM", "rope_theta": 1000000.0, "tokenizer": "qwen2"},
    "qwen2-tied": {"architecture": "Qwen2ForCausalLM", "tokenizer": "qwen2", "tie_word_embeddings": True},
    "unaligned": {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1},
}

_ARGUMENTS = ("architecture", "tokenizer", "dtype", "shards", "seed")


def write_tiny_model(folder: Path, variant: str = "llama", **changes: Any) -> Path:
    """Write the variant to `folder`, which is created if necessary, and return the folder.

    `changes` replace the variant's arguments: architecture, tokenizer (`smollm`, `qwen2`, `llama-bpe`, `gpt-2` or
    `sentencepiece`), dtype (`F32`, `F16` or `BF16`), shards, seed, and any entry of config.json.
    """
    arguments = {**VARIANTS[variant], **changes}
    config = tiny_config(**{key: value for key, value in arguments.items() if key not in ("dtype", "shards", "seed")})
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    write_tokenizer(folder, arguments.get("tokenizer", "smollm"))
    weights = random_weights(config, seed=arguments.get("seed", 0))
    write_shards(folder, weights, arguments.get("dtype", "F16"), arguments.get("shards", 1))
    return folder


def tiny_config(architecture: str = "LlamaForCausalLM", **entries: Any) -> dict[str, Any]:
    """Return a config.json: 2 layers, hidden size 128, 4 query heads and 2 KV heads of dimension 32."""
    tokenizer = entries.pop("tokenizer", "smollm")
    bos, eos = (1, 2) if tokenizer == "sentencepiece" else (0, 2)
    config = {
        "architectures": [architecture],
        "model_type": {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}.get(architecture, "qwen2"),
        "vocab_size": PADDED_VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
    if "rope_parameters" not in entries:
        config["rope_theta"] = 10000.0
    return {**config, **entries}


def random_weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Return float32 weights by Hugging Face name, scaled so that activations stay near 1."""
    generator = np.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    rows = config["num_attention_heads"] * head_dim
    rows_kv = config["num_key_value_heads"] * head_dim
    is_qwen2 = config["architectures"][0] == "Qwen2ForCausalLM"
    biased = {"q_proj", "k_proj", "v_proj"} if is_qwen2 else set()
    if config.get("attention_bias"):
        biased = {"q_proj", "k_proj", "v_proj", "o_proj"}

    def matrix(n_rows: int, n_columns: int) -> np.ndarray:
        return (generator.standard_normal((n_rows, n_columns)) / np.sqrt(n_columns)).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.1 * generator.standard_normal(hidden)).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden) * np.float32(np.sqrt(hidden))}
    for layer in range(config["num_hidden_layers"]):
        attention, feed_forward = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        shapes = {"q_proj": (rows, hidden), "k_proj": (rows_kv, hidden), "v_proj": (rows_kv, hidden)}
        for name, shape in {**shapes, "o_proj": (hidden, rows)}.items():
            weights[f"{attention}.{name}.weight"] = matrix(*shape)
            if name in biased:
                weights[f"{attention}.{name}.bias"] = 0.1 * generator.standard_normal(shape[0]).astype(np.float32)
        weights[f"{feed_forward}.gate_proj.weight"] = matrix(inner, hidden)
        weights[f"{feed_forward}.up_proj.weight"] = matrix(inner, hidden)
        weights[f"{feed_forward}.down_proj.weight"] = matrix(hidden, inner)
        weights[f"model.layers.{layer}.input_layernorm.weight"] = norm()
        weights[f"model.layers.{layer}.post_attention_layernorm.weight"] = norm()
    weights["model.norm.weight"] = norm()
    if not config.get("tie_word_embeddings"):
        weights["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    return weights


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the upper halves of float32 values: uint16, rounded to nearest."""
    return ((values.astype(np.float32).view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)


def write_safetensors(path: Path, weights: Mapping[str, np.ndarray], dtype: str) -> None:
    """Write a safetensors file; the library's writer for NumPy does not support BF16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    chunks, offset = [], 0
    for name, values in sorted(weights.items()):
        stored = {
            "F32": lambda values=values: values.astype("<f4"),
            "F16": lambda values=values: values.astype("<f2"),
            "BF16": lambda values=values: to_bfloat16(values),
        }[dtype]()
        chunks.append(stored.tobytes())
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [offset, offset + len(chunks[-1])],
        }
        offset += len(chunks[-1])
    write_safetensors_parts(path, header, b"".join(chunks))


def write_safetensors_parts(path: Path, header: Mapping[str, Any], data: bytes) -> None:
    """Write a safetensors file from a header, which may be deliberately invalid, and its data."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_shards(folder: Path, weights: Mapping[str, np.ndarray], dtype: str, shards: int = 1) -> None:
    """Write model.safetensors, or several shards with their index."""
    if shards == 1:
        write_safetensors(folder / "model.safetensors", weights, dtype)
        return
    weight_map = {}
    for shard in range(shards):
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(weights.items())[shard::shards])
        write_safetensors(folder / file_name, part, dtype)
        weight_map.update(dict.fromkeys(part, file_name))
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def write_tokenizer(folder: Path, kind: str = "smollm") -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    (folder / "tokenizer.json").write_text(tiny_tokenizer_json(kind), encoding="utf-8")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
    if kind == "sentencepiece":
        config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    else:
        config |= {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    _write_json(folder / "tokenizer_config.json", config)


def write_tokenizer_folder(folder: Path, kind: str, **entries: Any) -> Path:
    """Write config.json and a tokenizer, without weights; `entries` go into tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    _write_json(folder / "config.json", tiny_config(tokenizer=kind))
    write_tokenizer(folder, kind)
    edit_json(folder / "tokenizer_config.json", **entries)
    return folder


@functools.cache
def tiny_tokenizer_json(kind: str) -> str:
    """Return a tokenizer.json of about 400 tokens, trained on a few sentences."""
    return _sentencepiece_json() if kind == "sentencepiece" else _byte_level_json(kind)


def _byte_level_json(kind: str) -> str:
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    tokenizer.pre_tokenizer = {
        "gpt-2": lambda: gpt2,
        "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
        "qwen2": lambda: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated"), bytes_only]),
        "llama-bpe": lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"), bytes_only]
        ),
    }[kind]()
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    if kind == "llama-bpe":
        tokenizer.post_processor = _begin_with("<|endoftext|>", 0)
    return tokenizer.to_str()


def _begin_with(token: str, token_id: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, token_id)]
    )


def _sentencepiece_json() -> str:
    """Return a tokenizer like Llama 2's: spaces as U+2581, byte fallback, merges ordered by score."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=180, show_progress=False)
    trained.train_from_iterator((word for text in _TEXT for word in text.split("\n")), trainer)
    model = json.loads(trained.to_str())["model"]
    made_by_merge = dict.fromkeys("".join(pair) for pair in model["merges"])
    letters = [token for token in model["vocab"] if token not in made_by_merge]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *made_by_merge, *letters]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(left, right) for left, right in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens[:3]])
    tokenizer.post_processor = _begin_with("<s>", 1)
    return tokenizer.to_str()


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def edit_json(path: Path, **entries: Any) -> None:
    """Add or replace entries of a JSON file."""
    _write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **entries})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
