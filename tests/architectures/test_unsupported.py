"""Known families that are not run: each is refused with its reason, as a checkpoint and as a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from source_checks import fails

from tritgguf.architectures.dimensions import find_gguf_architecture
from tritgguf.errors import TritGgufError

CASES = [
    ("Qwen3NextForCausalLM", "qwen3next", "Gated DeltaNet"),
    ("Llama4ForConditionalGeneration", "llama4", "its text model has chunked attention"),
    ("Llama4ForCausalLM", "llama4", "its text model has chunked attention"),
]


@pytest.mark.parametrize(("hf_class", "gguf_name", "reason"), CASES)
def test_the_reason_is_given(tmp_path: Path, hf_class: str, gguf_name: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [hf_class], "text_config": {}}), "utf-8")
    fails(tmp_path, f"{hf_class} is not supported: .*{reason}")
    with pytest.raises(TritGgufError, match=f"model.gguf: {gguf_name} is not supported: .*{reason}"):
        find_gguf_architecture({"general.architecture": gguf_name}, "model.gguf")
