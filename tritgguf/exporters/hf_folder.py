"""Export a trit file as a Hugging Face folder of float16 weights that stock transformers loads."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.architectures import gguf_to_hf, tensor_names
from tritgguf.architectures.rope import ROPE_FREQS
from tritgguf.exporters import model_card
from tritgguf.exporters.row_blocks import RowBlocks
from tritgguf.formats import durable_output, safetensors_writer
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.tokenization import hf_folder_files
from tritgguf.tokenization.tokenizer import KEY_HUGGINGFACE, Tokenizer


def export_folder(
    file: GgufFile,
    output: Path,
    *,
    max_shard_bytes: int,
    base_model: str | None,
    thread_pool: ThreadPool,
    on_matrix: Callable[[str], None],
) -> dict[str, int]:
    """Write the folder and return file name -> size in bytes; the folder appears only when it is complete.

    `on_matrix` is called with a matrix's name (see `stacks`) after it is written. Raises TritGgufError if the output
    exists, the file is not a complete model, or float16 cannot hold a weight.
    """
    durable_output.check_new_folder(output)
    config = gguf_to_hf.model_config(file, hf_folder_files.special_ids(file.metadata))
    arch = file.metadata["general.architecture"]
    tensors = tensor_names.hf_tensors(
        arch, {name: info.shape for name, info in file.tensors.items() if name != ROPE_FREQS}
    )
    shards = safetensors_writer.plan_shards(
        {hf_name: tensor.shape for hf_name, tensor in tensors.items()}, max_shard_bytes
    )
    texts = _config_files(file, config)
    if len(shards) > 1:
        texts[safetensors_writer.INDEX_NAME] = _json(safetensors_writer.index(shards))
    weight_bytes = sum(shard.n_bytes for shard in shards)
    texts["README.md"] = model_card.model_card(file.path, base_model=base_model, weight_bytes=weight_bytes)
    durable_output.check_room(output, weight_bytes + sum(len(text.encode()) for text in texts.values()))

    def blocks(hf_name: str) -> Iterator[np.ndarray]:
        tensor = tensors[hf_name]
        for matrices in tensor.matrices:
            parts = (_float16_blocks(RowBlocks(file, matrix, thread_pool), arch, config) for matrix in matrices)
            if tensor.part.alternates or tensor.part.transposed:
                yield tensor.part.join([np.concatenate(list(blocks)) for blocks in parts])
            else:
                yield from itertools.chain.from_iterable(parts)
            for matrix in matrices:
                on_matrix(matrix)

    with durable_output.new_folder(output) as folder:
        for name, text in texts.items():
            durable_output.write_text(folder / name, text)
        for shard in shards:
            safetensors_writer.write_shard(folder, shard, blocks)
        return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def _float16_blocks(rows: RowBlocks, arch: str, config: dict[str, Any]) -> Iterator[np.ndarray]:
    """Yield a tensor's float16 weights with rows in Hugging Face's order, in blocks of whole heads."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for block in rows.decoded(multiple=head_dim):
        heads = len(block) // head_dim
        ordered = tensor_names.to_hf(arch, rows.name, block, heads, heads)
        yield rows.to_type(ordered, GGMLQuantizationType.F16)


def _config_files(file: GgufFile, config: dict[str, Any]) -> dict[str, str]:
    """Return name -> content of the configuration and tokenizer files."""
    tokenizer = Tokenizer(file.metadata, name=str(file.path))
    return {
        "config.json": _json(config),
        "generation_config.json": _json(hf_folder_files.generation_config(file.metadata, tokenizer)),
        "tokenizer.json": file.metadata[KEY_HUGGINGFACE],
        "tokenizer_config.json": _json(
            hf_folder_files.tokenizer_config(file.metadata, context=config["max_position_embeddings"])
        ),
        "special_tokens_map.json": _json(hf_folder_files.special_tokens(file.metadata)),
    }


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"
