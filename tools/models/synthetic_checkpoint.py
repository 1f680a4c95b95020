"""A sharded Hugging Face folder in the shape of a known model that takes little disk space.

Each matrix begins with the same random weights; the rest is a hole in a sparse file, which reads as zeros and takes no
space. A checkpoint of 150 GB takes a few GB. The memory use of a program does not depend on the weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np

from tools.models import random_model
from tools.models.random_model import QKV, byte_tokens
from tools.recovery.simulated_producer import produce
from tritgguf.architectures import tensor_names
from tritgguf.architectures.dimensions import Dimensions
from tritgguf.formats import safetensors_writer
from tritgguf.tokenization.gguf_to_hf import tokenizer_json_from_gguf

SHAPES = {
    "qwen2.5-72b": Dimensions(
        layers=80, vocabulary=152064, hidden=8192, feed_forward=29568, heads=64, kv_heads=8, head_dim=128, biased=QKV
    ),
    "qwen2.5-32b": Dimensions(
        layers=64, vocabulary=152064, hidden=5120, feed_forward=27648, heads=40, kv_heads=8, head_dim=128, biased=QKV
    ),
    "qwen2.5-7b": Dimensions(
        layers=28, vocabulary=152064, hidden=3584, feed_forward=18944, heads=28, kv_heads=4, head_dim=128, biased=QKV
    ),
    "qwen3-30b-a3b": random_model.SHAPES["qwen3-30b-a3b"][1],
}
_RANDOM_WEIGHTS = 1 << 22  # of each matrix
_RANDOM_WEIGHTS_OF_EXPERT = 1 << 16  # a checkpoint has thousands of them
_SHARD_BYTES = 4_000_000_000
# Whether it has experts -> class, GGUF name and model type.
_CLASSES = {False: ("Qwen2ForCausalLM", "qwen2", "qwen2"), True: ("Qwen3MoeForCausalLM", "qwen3moe", "qwen3_moe")}
_DEPTH = 2  # of dequantized trits


def write_checkpoint(folder: Path, sizes: Dimensions, *, dequantized: bool = False) -> None:
    """Write a new folder: float16 weights of Qwen2's or Qwen3-MoE's architecture, Gaussian or dequantized trits."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_config(sizes)), encoding="utf-8")
    (folder / "tokenizer.json").write_text(_tokenizer_json(sizes.vocabulary), encoding="utf-8")
    arch = _CLASSES[sizes.experts is not None][1]
    shapes = {name: tensor.shape for name, tensor in tensor_names.hf_tensors(arch, sizes.shapes()).items()}
    shards = safetensors_writer.plan_shards(shapes, _SHARD_BYTES)
    if len(shards) > 1:
        index = json.dumps(safetensors_writer.index(shards))
        (folder / safetensors_writer.INDEX_NAME).write_text(index, encoding="utf-8")
    weights = _dequantized_weights() if dequantized else _gaussian_weights()
    for shard in shards:
        _write_shard(folder / shard.file_name, shard, weights)


def _write_shard(path: Path, shard: safetensors_writer.Shard, weights: np.ndarray) -> None:
    with path.open("wb") as file:
        header = shard.header()
        file.write(header)
        start = len(header)
        for name, shape in shard.shapes.items():
            file.seek(start)
            if len(shape) == 1:
                file.write(np.ones(shape, np.float16).data)
            else:
                most = _RANDOM_WEIGHTS_OF_EXPERT if ".experts." in name else len(weights)
                file.write(weights[: min(most, int(np.prod(shape)))].data)
            start += safetensors_writer.half_bytes(shape)
        file.truncate(start)


def _gaussian_weights() -> np.ndarray:
    generator = np.random.default_rng(0)
    return (0.02 * generator.standard_normal(_RANDOM_WEIGHTS, np.float32)).astype(np.float16)


def _dequantized_weights() -> np.ndarray:
    generator = np.random.default_rng(0)
    groups = _RANDOM_WEIGHTS // 16
    scales = np.geomspace(0.005, 0.1, 27).astype(np.float32)[generator.integers(0, 27, (1, groups))]
    trits = generator.integers(-1, 2, (1, groups, 16, _DEPTH), np.int8)
    return produce(scales, trits.astype(np.float64), "scale * level / h", "float32").reshape(-1)


def _config(sizes: Dimensions) -> dict[str, object]:
    hf_class, _, model_type = _CLASSES[sizes.experts is not None]
    experts = (
        {}
        if sizes.experts is None
        else {
            "num_experts": sizes.experts.count,
            "num_experts_per_tok": sizes.experts.used,
            "moe_intermediate_size": sizes.experts.width,
            "norm_topk_prob": sizes.experts.normalizes,
        }
    )
    return {
        "architectures": [hf_class],
        "model_type": model_type,
        **experts,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.feed_forward,
        "max_position_embeddings": 32768,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "vocab_size": sizes.vocabulary,
    }


def _tokenizer_json(vocabulary: int) -> str:
    tokens, types = byte_tokens(vocabulary)
    return tokenizer_json_from_gguf(
        {
            gguf.Keys.Tokenizer.MODEL: "gpt2",
            gguf.Keys.Tokenizer.PRE: "qwen2",
            gguf.Keys.Tokenizer.LIST: tokens,
            gguf.Keys.Tokenizer.TOKEN_TYPE: types,
            gguf.Keys.Tokenizer.MERGES: ["\u0120 t"],
        }
    )
