"""Train a small OLMoE on the calibration text of `package_texts`, for a mixture whose router has learned to choose.

    python -m tools.models.train_mixture                    # models/small-olmoe, a few minutes on two cores

Random weights say little about the quality of a quantized mixture: their experts are alike and their routers choose at
random. This model predicts text of the subjects that it was trained on, its experts have become different, and the loss
that balances them is that of OLMoE. The evaluation text is not trained on.

The same seed, versions and number of threads give the same weights.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tools import tool_command
from tools.models.families import END
from tools.models.fetch_model import DEFAULT_FOLDER
from tools.quality import package_texts
from tritgguf.cli import terminal
from tritgguf.errors import TritGgufError
from tritgguf.reference.model import require_torch
from tritgguf.reference.process_settings import silent_transformers

NAME = "small-olmoe"
_VOCABULARY = 2048
_WINDOW = 256
_BATCH = 8
_SIZES = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_BALANCE = 0.01  # weight of the loss that balances the experts, as in OLMoE
_LEARNING_RATE = 2e-3
_WARMUP = 0.05  # of all steps


def train_mixture(
    folder: Path, text: str, *, steps: int, seed: int = 0, sizes: Mapping[str, Any] | None = None
) -> None:
    """Train a mixture on a text and write it with its tokenizer to a Hugging Face folder, in float16.

    `sizes` replace entries of its configuration. Raises TritGgufError if torch or transformers is missing.
    """
    require_torch()
    import torch
    import transformers

    tokenizer = _tokenizer(text)
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    torch.manual_seed(seed)
    with silent_transformers():
        entries = {**_SIZES, "output_router_logits": True, "router_aux_loss_coef": _BALANCE, **(sizes or {})}
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model("olmoe", **entries), dtype=torch.float32
        )
    _train(model, ids, steps, np.random.default_rng(seed))
    folder.mkdir(parents=True, exist_ok=True)
    with silent_transformers():
        model.config.output_router_logits = False
        model.half().save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def _tokenizer(text: str) -> Tokenizer:
    """Return a byte-pair tokenizer that is trained on the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return tokenizer


def experts_forward(experts: Any, inputs: Any, chosen: Any, scores: Any) -> Any:
    """Compute transformers' experts for tokens [n, width], without a gradient of the whole stack for every expert."""
    import torch

    output = torch.zeros_like(inputs)
    stacks = zip(experts.gate_up_proj.unbind(0), experts.down_proj.unbind(0), strict=True)
    for expert, (gate_up, down) in enumerate(stacks):
        tokens, place = torch.where(chosen == expert)
        gate, up = torch.nn.functional.linear(inputs[tokens], gate_up).chunk(2, dim=-1)
        product = torch.nn.functional.linear(experts.act_fn(gate) * up, down) * scores[tokens, place, None]
        output = output.index_add(0, tokens, product.to(output.dtype))
    return output


def _train(model: Any, ids: Any, steps: int, generator: np.random.Generator) -> None:
    """Minimize the loss of random windows of the text; AdamW with a warmup and a cosine decay."""
    import torch

    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_LEARNING_RATE, betas=(0.9, 0.95))
    warmup = max(1, round(_WARMUP * steps))
    started, mean_loss = time.perf_counter(), 0.0
    model.train()
    for layer in model.model.layers:
        layer.mlp.experts.forward = partial(experts_forward, layer.mlp.experts)
    with terminal.progress(in_bytes=False) as report:
        for step in range(steps):
            rate = min((step + 1) / warmup, 0.5 + 0.5 * np.cos(np.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * rate
            starts = generator.integers(0, len(ids) - _WINDOW, _BATCH)
            batch = torch.stack([ids[start : start + _WINDOW] for start in starts])
            with silent_transformers():
                loss = model(batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            mean_loss = 0.98 * mean_loss + 0.02 * float(loss.detach()) if step else float(loss.detach())
            report("training", step + 1, steps)
    terminal.note(f"{steps} steps in {time.perf_counter() - started:.0f} s, loss {mean_loss:.3f}")


def main(
    folder: Annotated[Path | None, typer.Argument(help=f"Folder to write; models/{NAME} if none.")] = None,
    steps: Annotated[int, typer.Option(help=f"Steps of {_BATCH} windows of {_WINDOW} tokens.", min=1)] = 600,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the windows.")] = 0,
) -> None:
    """Train a small mixture of experts on text of installed packages."""
    target = folder or DEFAULT_FOLDER / NAME
    if target.exists():
        raise TritGgufError(f"{target}: exists already; remove it first, or name another folder")
    train_mixture(target, package_texts.texts()[0], steps=steps, seed=seed)


if __name__ == "__main__":
    tool_command.run(main)
