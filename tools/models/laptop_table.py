"""What fits a laptop: sizes of published models as trit files, computed from their shapes.

    python -m tools.models.laptop_table --depth 2      # the table of docs/laptops.md

Nothing is downloaded: the shapes are those of the models' config.json. A size is that of the tensors of the file that
`convert` writes with its default recipe; a token reads the whole output head, one row of the embeddings, and of a
mixture's experts only those that it uses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from tools import tool_command
from tritgguf.architectures.dimensions import dimensions_from_config, find_architecture
from tritgguf.architectures.experts import STACKS
from tritgguf.architectures.hf_to_gguf import is_tied
from tritgguf.architectures.tensor_names import EMBEDDINGS, HEAD, quantized_tensor
from tritgguf.cli import terminal
from tritgguf.conversion.plan import planned_tensor
from tritgguf.conversion.recipes import DEFAULT

MEMORY = (8, 16, 32)  # GB that laptops have, of 2**30 bytes
_SYSTEM_BYTES = 2.5e9  # for the system and this program
_CONTEXT = 4096
_BYTES_OF_KEYS_AND_VALUES = 2  # float16


def _config(
    hf_class: str, layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "architectures": [hf_class],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        **more,
    }


def _qwen3(layers: int, hidden: int, inner: int, heads: int, *, tied: bool = False) -> dict[str, Any]:
    entries = {"head_dim": 128, "tie_word_embeddings": tied}
    return _config("Qwen3ForCausalLM", layers, hidden, inner, heads, 8, 151936, **entries)


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    entries = {"num_local_experts": experts, "num_experts_per_tok": 4}
    return _config("GptOssForCausalLM", layers, 2880, 2880, 64, 8, 201088, **entries)


_QWEN3_MOE = {"head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3-4B": _qwen3(36, 2560, 9728, 32, tied=True),
    "OLMoE-1B-7B": _config("OlmoeForCausalLM", 16, 2048, 1024, 16, 16, 50304),
    "Llama-3.1-8B": _config("LlamaForCausalLM", 32, 4096, 14336, 32, 8, 128256),
    "Qwen3-8B": _qwen3(36, 4096, 12288, 32),
    "Qwen3-14B": _qwen3(40, 5120, 17408, 40),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "Qwen3-30B-A3B": _config("Qwen3MoeForCausalLM", 48, 2048, 6144, 32, 4, 151936, **_QWEN3_MOE),
    "Qwen3-32B": _qwen3(64, 5120, 25600, 64),
    "Mixtral-8x7B": _config("MixtralForCausalLM", 32, 4096, 14336, 32, 8, 32000),
    "gpt-oss-120b": _gpt_oss(36, 128),
}
"""Name of a published model -> the entries of its config.json that determine its size."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model as a trit file.

    Attributes:
        name: of the model.
        parameters, active: how many weights it has, and how many of them a token uses.
        file_bytes: bytes of all tensors of the file.
        token_bytes: how many of them a generated token reads.
        context_bytes: bytes of the keys and values of 4096 tokens.

    """

    name: str
    parameters: int
    active: int
    file_bytes: int
    token_bytes: int
    context_bytes: int

    @property
    def laptop(self) -> int | None:
        """The least memory of `MEMORY`, in GB, that holds file, context and system; None if none does."""
        needed = self.file_bytes + self.context_bytes + _SYSTEM_BYTES
        return next((memory for memory in MEMORY if needed <= memory * 2**30), None)


def sizes_of(name: str, config: Mapping[str, Any], depth: int) -> Sizes:
    """Return the sizes of the model with this config.json, its layers at `depth` trits."""
    dimensions, architecture = dimensions_from_config(config), find_architecture(config)
    tied = is_tied(config, architecture)
    tables = DEFAULT.depths(depth, tied=tied)
    total = active = n_bytes = read = 0
    for tensor, shape in dimensions.shapes().items():
        if tied and tensor == HEAD:
            continue
        planned = planned_tensor(tensor, shape, depth if quantized_tensor(tensor) else tables.get(tensor, 0))
        share = 1.0
        if tensor == EMBEDDINGS and not tied:
            share = 1 / dimensions.vocabulary
        if dimensions.experts is not None and tensor.split(".")[2:3] and tensor.split(".")[2] in STACKS:
            share = dimensions.experts.used / dimensions.experts.count
        total, n_bytes = total + math.prod(shape), n_bytes + planned.n_bytes
        active, read = active + round(share * math.prod(shape)), read + round(share * planned.n_bytes)
    width = 2 * dimensions.layers * dimensions.kv_heads * dimensions.head_dim
    return Sizes(name, total, active, n_bytes, read, width * _CONTEXT * _BYTES_OF_KEYS_AND_VALUES)


def main(
    depth: Annotated[int, typer.Option(min=1, max=4, help="Trits per weight of the layers.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print the sizes of published models as trit files, and which memory holds them."""
    rows = [sizes_of(name, config, depth) for name, config in CONFIGS.items()]
    if as_json:
        terminal.print_json([{**vars(row), "laptop": row.laptop} for row in rows])
        return
    print("| model | parameters | a token uses | file | a token reads | 4096 tokens of context | laptop |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        numbers = [row.parameters, row.active, row.file_bytes, row.token_bytes, row.context_bytes]
        texts = [f"{number / 1e9:.{1 if number >= 1e10 else 2}f}" for number in numbers]
        units = ("B", "B", "GB", "GB", "GB")
        cells = [f"{text} {unit}" for text, unit in zip(texts, units, strict=True)]
        fits = f"{row.laptop} GB" if row.laptop else "more"
        print(f"| {row.name} | {' | '.join(cells)} | {fits} |")


if __name__ == "__main__":
    tool_command.run(main)
