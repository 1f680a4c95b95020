"""The text model inside a multimodal checkpoint, against transformers' whole model on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sequences import open_sequence

pytest.importorskip("torch")

from tools.models.families import write_byte_tokenizer
from tritgguf.architectures.multimodal import text_entries, text_tensor_name
from tritgguf.architectures.table import ARCHITECTURES
from tritgguf.conversion.convert import convert
from tritgguf.evaluation.verify import verify
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.reference.process_settings import silent_transformers

_TEXT = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 257,
}
_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 128}
_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
_KINDS: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": {**_TEXT, "sliding_window": 48}, "vision_config": {**_VISION, "image_size": 28}},
    "lfm2_vl": {
        "text_config": {
            **{entry: value for entry, value in _TEXT.items() if entry != "head_dim"},
            "layer_types": ["conv", "full_attention"],
        },
        "vision_config": {**_VISION, "num_patches": 16},
    },
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral", "sliding_window": None},
        "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 16},
    },
    "qwen3_5": {
        "text_config": {
            **_TEXT,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "rope_parameters": {**_ROPE, "mrope_interleaved": True, "partial_rotary_factor": 0.25},
        },
        "vision_config": _QWEN_VISION,
    },
    "qwen2_5_vl": {"text_config": {**_TEXT, "rope_parameters": _ROPE}, "vision_config": _QWEN_VISION},
    "qwen3_vl": {
        "text_config": {**_TEXT, "rope_parameters": {**_ROPE, "mrope_interleaved": True}},
        "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0]},
    },
    "qwen3_vl_moe": {
        "text_config": {
            **_TEXT,
            "moe_intermediate_size": 48,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "rope_parameters": {**_ROPE, "mrope_interleaved": True},
        },
        "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0]},
    },
}
_CLASSES = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}
TOKENS = np.random.default_rng(0).integers(0, 256, 100).tolist()


def write_random(folder: Path, kind: str) -> Any:
    """Write a random multimodal model and return it in float32."""
    import torch
    import transformers

    torch.manual_seed(0)
    with silent_transformers():
        config = transformers.AutoConfig.for_model(kind, **_KINDS[kind], tie_word_embeddings=False)
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float16)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "embed_tokens" in name:
                    parameter.normal_()
                elif parameter.dim() > 1:
                    parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
                elif "norm" not in name:
                    parameter.normal_(0.0, 0.2)
        model.save_pretrained(folder)
        write_byte_tokenizer(folder)
        return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def load_text_weights(model: Any, file: GgufFile) -> None:
    """Replace the weights of the whole model's text part by those of a trit file."""
    from tritgguf.architectures.delta_net import delta_net_of
    from tritgguf.architectures.table import GGUF_ARCHITECTURES
    from tritgguf.architectures.tensor_names import module_parameter, to_hf
    from tritgguf.reference.model import head_counts

    arch, heads = file.metadata["general.architecture"], head_counts(file.metadata)
    delta_net = delta_net_of(file.metadata, GGUF_ARCHITECTURES[arch], str(file.path))
    parameters = {text_tensor_name(name): parameter for name, parameter in model.named_parameters()}
    for name in file.tensors:
        weights = to_hf(arch, name, file.read_float32(name), *heads, delta_net)
        parameter, part = module_parameter(arch, name)
        place = part.view(parameters[parameter].detach().numpy())
        np.copyto(place, weights.reshape(place.shape))


@pytest.mark.parametrize("kind", _KINDS)
def test_a_text_has_the_logits_of_the_whole_model(tmp_path: Path, kind: str) -> None:
    import torch

    model = write_random(tmp_path / "model", kind)
    report = convert(tmp_path / "model", tmp_path / "d3.gguf", depth=3, encoder="v2")
    assert any("images are left out" in warning for warning in report.warnings)
    file = GgufFile(tmp_path / "d3.gguf")
    load_text_weights(model, file)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    sequence = open_sequence(file, context=len(TOKENS), exact=True, cache_type="f32")
    found = sequence.forward(TOKENS, all_logits=True)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert verify(tmp_path / "model", file.path, tokens=100).max_rel_logit_diff < 1e-5


def test_stacks_of_experts_may_be_stored_transposed(tmp_path: Path) -> None:
    """As published checkpoints have them; transformers 5 writes them the other way and reads both."""
    from safetensors.numpy import load_file, save_file

    write_random(tmp_path / "model", "qwen3_vl_moe")
    convert(tmp_path / "model", tmp_path / "saved.gguf", depth=2, encoder="v2")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    stacks = [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    for name in stacks:
        weights[name] = np.ascontiguousarray(weights[name].swapaxes(1, 2))
    save_file(weights, path)
    convert(tmp_path / "model", tmp_path / "published.gguf", depth=2, encoder="v2")
    saved, published = GgufFile(tmp_path / "saved.gguf"), GgufFile(tmp_path / "published.gguf")
    assert len(stacks) == 4
    for name in saved.tensors:
        np.testing.assert_array_equal(published.read_float32(name), saved.read_float32(name))


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_what_the_config_of_a_text_model_may_leave_out(kind: str) -> None:
    """A saved checkpoint lacks entries of nested configs that have the default of their class."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, text_config={}).get_text_config()
    entries = text_entries({"architectures": [_CLASSES[kind]], "text_config": {}}, "config.json")
    assert entries is not None
    architecture = ARCHITECTURES[entries["architectures"][0]]
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    expected = {**vars(config), "rope_theta": rope["rope_theta"]}
    if kind == "qwen3_vl_moe":
        expected["norm_topk_prob"] = True  # whatever config.json says
    names = {"rope_theta", "rms_norm_eps", "num_key_value_heads", "max_position_embeddings", "norm_topk_prob"}
    general = {"rope_theta": 1e4, "rms_norm_eps": 1e-6}
    for name in names & expected.keys():
        assert entries.get(name, architecture.defaults.get(name, general.get(name))) == expected[name], name


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("visual.blocks.0.attn.qkv.weight", None),
        ("model.vision_tower.vision_model.post_layernorm.bias", None),
        ("multi_modal_projector.linear_1.weight", None),
    ],
)
def test_names_of_both_layouts(stored: str, expected: str | None) -> None:
    assert text_tensor_name(stored) == expected
