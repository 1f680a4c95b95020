"""Write a stock GGUF file as a Hugging Face FP16 folder: config, safetensors, tokenizer, chat template.

The folder is "the FP16 model" of the demo and the tests. transformers reads the weights, so they do not depend on this
project's own handling of names and row orders, which the tests compare with them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tritgguf.cli import terminal
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.reference.model import require_torch
from tritgguf.reference.process_settings import silent_transformers
from tritgguf.tokenization.gguf_to_hf import tokenizer_json_from_gguf

_MAX_SHARD_SIZE = "1GB"
# Ends a text in the families that we fetch, in addition to the end-of-turn token that the file calls eos.
_END_OF_TEXT = "<|endoftext|>"


def write_hf_folder(gguf_path: Path, folder: Path) -> None:
    """Write the model of a stock GGUF file to `folder` unless it exists; it appears when it is complete.

    Raises TritGgufError: torch or transformers is missing, a weight is outside the range of FP16, or
    `tokenizer_json_from_gguf` does not support the tokenizer.
    """
    if folder.exists():
        return
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' GGUF reader has a progress bar without a switch
    require_torch()
    terminal.note(f"writing {folder}")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with silent_transformers():
            _write_model(gguf_path, partial)
            _write_tokenizer(gguf_path, partial)
        for path in partial.iterdir():
            path.chmod(0o644)  # safetensors makes its files private
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_model(gguf_path: Path, folder: Path) -> None:
    import torch
    import transformers

    # Without `dequantize`, the model counts as quantized and is saved as such.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_path.parent,
        gguf_file=gguf_path.name,
        dtype=torch.float16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    for name, weight in model.state_dict().items():
        if not torch.isfinite(weight).all():
            raise TritGgufError(f"{gguf_path}: tensor {name} does not fit FP16")
    # GGUF stores float32: 1e-5 is read as 9.999999747378752e-06.
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.7g}")
    model.save_pretrained(folder, max_shard_size=_MAX_SHARD_SIZE)


def _write_tokenizer(gguf_path: Path, folder: Path) -> None:
    import transformers

    metadata = GgufFile(gguf_path).metadata
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    tokenizer.model_max_length = metadata[f"{metadata['general.architecture']}.context_length"]
    tokenizer.save_pretrained(folder)
    # transformers 5.24 makes a tokenizer.json with errors: it omits that SmolLM2 splits digits and that Qwen2
    # normalizes to NFC, and treats the entries that pad the vocabulary as words.
    text = tokenizer_json_from_gguf(metadata, str(gguf_path))
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    _update_json(
        folder / "tokenizer_config.json",
        add_bos_token=metadata.get("tokenizer.ggml.add_bos_token", False),
        add_prefix_space=False,
    )
    end_of_text = metadata["tokenizer.ggml.tokens"].index(_END_OF_TEXT)
    _update_json(folder / "generation_config.json", eos_token_id=[metadata["tokenizer.ggml.eos_token_id"], end_of_text])


def _update_json(path: Path, **entries: Any) -> None:
    description = json.loads(path.read_text(encoding="utf-8")) | entries
    path.write_text(json.dumps(description, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
