"""The model card (README.md) of an exported Hugging Face folder, with figures from the trit file."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from tritgguf.formats import trit_types
from tritgguf.formats.description import FileDescription, describe
from tritgguf.text_format import format_bytes, one_line
from tritgguf.version import __version__

_UNQUOTED_YAML = re.compile(r"[A-Za-z][\w./+-]*")
CODEC = """\
## Codec

A weight is a level, stored as d balanced trits, divided by the largest level and multiplied by the scale of its group.
The scales come from a codebook per matrix. The codec is by Eric Stentzel (Entrit Systems), "Balanced Ternary
Post-Training Quantization for Large Language Models", 2026.
"""
_TAGS = ("tritgguf", "balanced-ternary", "quantized")


def model_card(path: Path, *, base_model: str | None, weight_bytes: int) -> str:
    """Return the card of the trit file at `path` exported to float16.

    `base_model` is the hub id of its source, if known; `weight_bytes` is the size of the exported weights. Raises
    TritGgufError if the file cannot be read.
    """
    file = describe(path)
    name = f"{one_line(file.name)}, {describe_depths(file)}"
    return f"""{front_matter(file, base_model, "transformers")}
# {name}

A language model whose matrices were quantized to balanced ternary numbers, exported by tritgguf {__version__}. The
weights in this folder are the quantized ones, decoded and rounded to float16, so that stock `transformers` loads them;
they take as much space as those of any float16 model.

{facts(file, base_model, weight_bytes)}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

{CODEC}"""


def front_matter(file: FileDescription, base_model: str | None, library: str) -> str:
    """Return the card's entries for the hub, with its `library_name`."""
    general = {key.removeprefix("general."): value for key, value in file.metadata.items()}
    entries: dict[str, Any] = {}
    if base_model is not None:
        entries |= {"base_model": base_model, "base_model_relation": "quantized"}
    for entry, key in (("license", "license"), ("license_name", "license.name"), ("license_link", "license.link")):
        if isinstance(text := general.get(key), str) and text:
            entries[entry] = text
    if languages := _texts(general.get("languages")):
        entries["language"] = languages
    entries |= {"library_name": library, "pipeline_tag": "text-generation"}
    entries["tags"] = list(dict.fromkeys([*_TAGS, *_texts(general.get("tags"))]))
    lines = ["---"]
    for entry, value in entries.items():
        if isinstance(value, list):
            lines += [f"{entry}:", *(f"- {_yaml(item)}" for item in value)]
        else:
            lines.append(f"{entry}: {_yaml(value)}")
    return "\n".join([*lines, "---", ""])


def facts(file: FileDescription, base_model: str | None, weight_bytes: int | None) -> str:
    """Return the table of what is known of a file; `weight_bytes` None: it is not exported."""
    rows = _rows(file, base_model, weight_bytes)
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)])


def _rows(file: FileDescription, base_model: str | None, weight_bytes: int | None) -> list[tuple[str, str]]:
    """Return the rows of the table."""
    packed = [entry for entry in file.types if entry.type in trit_types.TritType.__members__]
    quantized = sum(entry.weights for entry in packed)
    source = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else cell(file.name)
    rows = [("Source model", source)]
    for entry in sorted(packed, key=lambda entry: entry.type):
        depth = trit_types.TritType[entry.type].depth
        rows.append(
            (
                f"Depth d={depth}",
                f"{3**depth} levels per weight; matrices: {entry.tensors}, weights: {_count(entry.weights)}",
            )
        )
    if quantized:
        trits = (
            sum(_nominal_bits(trit_types.TritType[entry.type].depth) * entry.weights for entry in packed) / quantized
        )
        rows += [
            ("Bits per weight", f"{trits:.2f} of information, over the quantized matrices only"),
            ("Bits per weight in the GGUF file", f"{file.bits_per_weight_quantized:.2f}, over the same matrices"),
        ]
    codec, encoder = file.metadata.get(trit_types.KEY_CODEC), file.metadata.get(trit_types.KEY_ENCODER)
    return [
        *rows,
        *_measures(file),
        ("Group size", f"{trit_types.GROUP_SIZE} weights of a row share a scale"),
        (
            "Scale codebook",
            f"{trit_types.CODEBOOK_SIZE} entries per matrix; a scale is {trit_types.SCALE_DEPTH} trits"
            f" (scale_depth={trit_types.SCALE_DEPTH})",
        ),
        ("Codec, encoder", f"{cell(codec)}, {cell(encoder)}"),
        ("Quantized", f"{_count(quantized)} of {_count(file.weights)} weights: {_tensor_kinds(file, quantized=True)}"),
        ("Not quantized", _tensor_kinds(file, quantized=False)),
        *([] if weight_bytes is None else [("Size of the weights here", f"{format_bytes(weight_bytes)}, float16")]),
        ("Size of the packed GGUF file", format_bytes(file.file_bytes)),
    ]


def _measures(file: FileDescription) -> list[tuple[str, str]]:
    """Return the rows of what was measured of the file, if it says so."""
    score = file.score
    if score is None:
        return []
    return [
        ("KL divergence from the source", f"{score.kl_mean:.4f} nats in the mean, {score.kl_p99:.4f} at most for 99 %"),
        ("Same most likely token", f"{score.top1_agreement:.1%}"),
        ("Perplexity", f"{score.perplexity:.3f}; of the source: {score.perplexity_reference:.3f}"),
        ("Measured on", f"{score.tokens} tokens of the text with SHA-256 {cell(score.text)}"),
    ]


def describe_depths(file: FileDescription) -> str:
    """Return `uniform d=2`, or `mixed d=2, 3`."""
    depths = [
        trit_types.TritType[entry.type].depth for entry in file.types if entry.type in trit_types.TritType.__members__
    ]
    if not depths:
        return "not quantized"
    return f"{'uniform' if len(depths) == 1 else 'mixed'} d={', '.join(map(str, sorted(depths)))}"


def _nominal_bits(depth: int) -> float:
    """Return the information per weight in bits: d trits and a share of the group's scale."""
    return (depth + trit_types.SCALE_DEPTH / trit_types.GROUP_SIZE) * math.log2(3)


def _tensor_kinds(file: FileDescription, *, quantized: bool) -> str:
    """Return the quantized or the unquantized tensors, as GGUF names without the block index."""
    kinds = dict.fromkeys(
        re.sub(r"^blk\.\d+\.", "", tensor.name) for tensor in file.tensors if (tensor.codebook is not None) == quantized
    )
    return ", ".join(cell(kind) for kind in kinds) or "none"


def _count(weights: int) -> str:
    return f"{weights / 1e9:.2f} billion" if weights >= 1e9 else f"{weights / 1e6:.1f} million"


def _texts(value: Any) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def cell(value: Any) -> str:
    """Escape a text from the file for a Markdown table."""
    return re.sub(r"([\\`*_<>\[\]|])", r"\\\1", one_line(str(value)))


def _yaml(text: str) -> str:
    """Return a text as a YAML scalar. A JSON string is valid YAML; unquoted words such as `no` would not be strings."""
    is_plain = _UNQUOTED_YAML.fullmatch(text) and text.lower() not in (
        "yes",
        "no",
        "on",
        "off",
        "true",
        "false",
        "null",
    )
    return text if is_plain else json.dumps(text, ensure_ascii=False)
