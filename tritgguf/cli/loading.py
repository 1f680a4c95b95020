"""Loading a model for a command that answers."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritgguf.cli import terminal
from tritgguf.cli.model_file import local_file

if TYPE_CHECKING:
    from tritgguf.generation.loaded_model import LoadedModel


def load_model(file: Path, **settings: Any) -> LoadedModel:
    """Load a model, with settings as `load` takes them, and note what its context and its size mean."""
    from tritgguf.generation.loaded_model import load

    if settings.get("draft") is not None:
        settings["draft"] = local_file(settings["draft"])
    gc.disable()  # loading creates a million objects and no garbage; collection would take 50 ms
    try:
        model = load(file, on_compilation=terminal.print_compilation_note, **settings)
    finally:
        gc.enable()
    if model.context > model.trained_context:
        terminal.note(
            f"warning: the model was trained for {model.trained_context} tokens, the context has {model.context};"
            " beyond the former its answers get worse"
        )
    if model.engine.speculation is not None and not model.engine.speculation.can_pay:
        terminal.note(
            "note: nothing will be drafted, because it would not save time: the draft model is too large beside this"
            " one, or --draft-max too small"
        )
    _note_long_rope(model)
    _note_what_fits(model)
    return model


def _note_long_rope(model: LoadedModel) -> None:
    """Note that LongRoPE's frequencies are those for long texts, because the context is long."""
    config = model.engine.model.config
    if config.long_rotations is not config.rotations and model.context > config.original_context:
        terminal.note(
            f"note: a context of {model.context} tokens takes this model's frequencies for long texts; for texts of at"
            f" most {config.original_context}, --ctx-size {config.original_context} takes those that fit them better"
        )


def _note_what_fits(model: LoadedModel) -> None:
    """Note that a file is larger than the memory that is available, and what that means."""
    from tritgguf.machine import machine_memory_bytes

    memory, file_bytes = machine_memory_bytes(), model.engine.model.file_bytes
    if memory is None or file_bytes < memory[1]:
        return
    mixture = model.engine.model.config.routing.chosen > 0
    read = "experts that are not in memory are" if mixture else "for each token, what does not fit is"
    terminal.note(
        f"note: the file has {file_bytes / 1e9:.1f} GB, but only {memory[1] / 1e9:.1f} GB of memory are available;"
        f" {read} read from the disk, which is slow"
    )
