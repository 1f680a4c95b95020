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
from tritgguf.architectures.delta_net import DeltaNet, delta_net_of
from tritgguf.architectures.rope import FACTOR_TENSORS
from tritgguf.architectures.table import GGUF_ARCHITECTURES
from tritgguf.exporters import model_card
from tritgguf.exporters.row_blocks import RowBlocks
from tritgguf.formats import durable_output, safetensors_writer
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.tokenization import hf_folder_files
from tritgguf.tokenization.tokenizer import KEY_HUGGINGFACE, Tokenizer


class HuggingFaceFolder:
    """What a trit file becomes as a folder: small text files, and shards of weights that are written one by one.

    Attributes:
        shards: the weight files, in order; writing one needs none of the others.
        texts: name -> content of all other files.

    """

    def __init__(
        self,
        file: GgufFile,
        *,
        max_shard_bytes: int,
        base_model: str | None,
        thread_pool: ThreadPool,
        on_matrix: Callable[[str], None],
    ) -> None:
        """Plan the folder; writes nothing.

        `on_matrix` is called with a matrix's name (see `stacks`) after it is written. Raises TritGgufError if the file
        is not a complete model.
        """
        self._file, self._thread_pool, self._on_matrix = file, thread_pool, on_matrix
        self._config = gguf_to_hf.model_config(file, hf_folder_files.special_ids(file.metadata))
        self._arch = file.metadata["general.architecture"]
        self._delta_net = delta_net_of(file.metadata, GGUF_ARCHITECTURES[self._arch], str(file.path))
        self._tensors = tensor_names.hf_tensors(
            self._arch, {name: info.shape for name, info in file.tensors.items() if name not in FACTOR_TENSORS}
        )
        shapes = {hf_name: tensor.shape for hf_name, tensor in self._tensors.items()}
        self.shards = safetensors_writer.plan_shards(shapes, max_shard_bytes)
        weight_bytes = sum(shard.n_bytes for shard in self.shards)
        self.texts = _config_files(file, self._config)
        if len(self.shards) > 1:
            self.texts[safetensors_writer.INDEX_NAME] = _json(safetensors_writer.index(self.shards))
        self.texts["README.md"] = model_card.model_card(file.path, base_model=base_model, weight_bytes=weight_bytes)
        self.n_bytes = weight_bytes + sum(len(text.encode()) for text in self.texts.values())

    def write_shard(self, folder: Path, shard: safetensors_writer.Shard) -> None:
        """Write one of the shards and sync it. Raises TritGgufError if float16 cannot hold a weight, and OSError."""
        safetensors_writer.write_shard(folder, shard, self._blocks)

    def _blocks(self, hf_name: str) -> Iterator[np.ndarray]:
        """Yield a tensor's float16 values in order."""
        tensor = self._tensors[hf_name]
        for matrices in tensor.matrices:
            parts = (
                _float16_blocks(
                    RowBlocks(self._file, matrix, self._thread_pool), self._arch, self._config, self._delta_net
                )
                for matrix in matrices
            )
            if tensor.part.alternates or tensor.part.transposed:
                yield tensor.part.join([np.concatenate(list(blocks)) for blocks in parts])
            else:
                yield from itertools.chain.from_iterable(parts)
            for matrix in matrices:
                self._on_matrix(matrix)


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
    planned = HuggingFaceFolder(
        file, max_shard_bytes=max_shard_bytes, base_model=base_model, thread_pool=thread_pool, on_matrix=on_matrix
    )
    durable_output.check_room(output, planned.n_bytes)
    with durable_output.new_folder(output) as folder:
        for name, text in planned.texts.items():
            durable_output.write_text(folder / name, text)
        for shard in planned.shards:
            planned.write_shard(folder, shard)
        return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def _float16_blocks(
    rows: RowBlocks, arch: str, config: dict[str, Any], delta_net: DeltaNet | None
) -> Iterator[np.ndarray]:
    """Yield a tensor's float16 weights with rows in Hugging Face's order, in blocks of whole heads."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    all_rows = tensor_names.reorders_rows(rows.name, delta_net)
    for block in rows.decoded(multiple=rows.count if all_rows else head_dim):
        heads = len(block) // head_dim
        ordered = tensor_names.to_hf(arch, rows.name, block, heads, heads, delta_net)
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
