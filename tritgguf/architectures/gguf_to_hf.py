"""Conversion of GGUF keys into config.json, and into the arguments of transformers' configuration class.

It applies the rules of the model's family (`keys`). `hf_to_gguf` is the other direction. GGUF does not keep all of the
original config.json: a Mistral model without a sliding window becomes a LlamaForCausalLM, which computes the same, and
training settings get their defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tritgguf.architectures import dimensions, keys
from tritgguf.architectures.key_rules import GgufKeys
from tritgguf.architectures.rope import FACTOR_TENSORS, LONG_FACTORS, ROPE_FREQS
from tritgguf.architectures.rope_keys import legacy_rope_entries, llama3_scaling, long_rope_scaling
from tritgguf.errors import TritGgufError

if TYPE_CHECKING:
    from tritgguf.formats.gguf_file import GgufFile

_HEAD = "output.weight"
_FIRST_ENTRIES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
)
"""The first entries of config.json; the others follow in the order of GGUF's keys."""


def model_config(file: GgufFile, special_ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the config.json of a file's model with float16 weights; `special_ids` as in `hf_folder_files`.

    All versions of transformers can read its layout (rope_theta and rope_scaling, torch_dtype). Raises TritGgufError
    for keys that are missing or impossible, and for tensors that contradict them.
    """
    where = str(file.path)
    if "token_embd.weight" not in file.tensors:
        raise TritGgufError(f"{where}: has no tensor token_embd.weight; it is not a language model")
    architecture = dimensions.find_gguf_architecture(file.metadata, where)
    shapes = {name: info.shape for name, info in file.tensors.items()}
    entries = config_entries(file.metadata, shapes, where)
    # No version of transformers before the present layout knows a family with states.
    rope = {} if architecture.has_states else legacy_rope_entries(entries.pop("rope_parameters"))
    config = {
        "architectures": [architecture.hf_class],
        "model_type": architecture.hf_model_type,
        "torch_dtype": "float16",
        **entries,
        # Some configuration classes have a default padding token, which may be outside the vocabulary.
        "pad_token_id": None,
        **{f"{name}_token_id": token for name, token in special_ids.items()},
        **rope,
        architecture.activation_entry: architecture.activation,
    }
    if f"{architecture.gguf_name}.{keys.HEAD_DIM.gguf}" not in file.metadata:
        del config["head_dim"]
    if config.get("rope_scaling", {}) is None and "rope_scaling" in architecture.defaults:
        config["rope_scaling"] = {"rope_type": "default"}  # null would mean the default
    if ROPE_FREQS in file.tensors:
        config["rope_scaling"] = llama3_scaling(file.read_float32(ROPE_FREQS), config, where)
    if LONG_FACTORS in file.tensors:
        has_mscales = architecture.has_mscales
        scaling = long_rope_scaling(file.read_float32, file.metadata, config, where, has_mscales=has_mscales)
        config["rope_scaling"] = {"type": "longrope", **scaling}
    _check_shapes(shapes, config, where)
    return config


def config_entries(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    """Return the arguments of a transformers configuration for the keys of a GGUF model.

    `shapes` are those of its tensors; they determine the vocabulary size, whether the head is tied and which matrices
    have biases. Raises TritGgufError for a key that is missing or impossible, and for a rope scaling other than linear
    and yarn (Llama 3's and LongRoPE are tensors, not keys).
    """
    architecture = dimensions.find_gguf_architecture(metadata, where)
    vocabulary, biased = shapes["token_embd.weight"][0], dimensions.biased_matrices(shapes)
    sizes = dimensions.dimensions_from_gguf(metadata, vocabulary, biased, where)
    model = GgufKeys(metadata, shapes.keys(), architecture, sizes, where)
    entries: dict[str, Any] = {}
    for rule in architecture.rules():
        entries |= rule.to_hf(model)
    return architecture.own_entries({name: entries[name] for name in (*_FIRST_ENTRIES, *entries)})


def model_type_of(metadata: Mapping[str, Any], where: str) -> str:
    """Return transformers' `model_type` of a GGUF model; TritGgufError for an unsupported architecture."""
    return dimensions.find_gguf_architecture(metadata, where).hf_model_type


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], where: str) -> None:
    """Raise TritGgufError unless the tensors match a model with this config."""
    expected = dimensions.dimensions_from_config(config, where).shapes()
    if config["tie_word_embeddings"]:
        del expected[_HEAD]
    for name in {**expected, **shapes}:
        if name not in FACTOR_TENSORS and shapes.get(name) != expected.get(name):
            found = f"has shape {shapes[name]}" if name in shapes else "is missing"
            required = f"its keys require {expected[name]}" if name in expected else "its keys allow no such tensor"
            raise TritGgufError(f"{where}: tensor {name} {found}, but {required}; convert the model again")
