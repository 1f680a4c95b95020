"""What lm-eval has to know: the model's name and the folder of the tasks.

pyproject.toml names the model as an entry point too (`lm_eval.models`). Versions of lm-eval that read entry points know
the model without this module; for the others `python -m tritgguf.lm_eval` registers it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tritgguf.errors import MissingExtraError

MODEL_NAME = "tritgguf"
MODEL_CLASS = "tritgguf.lm_eval.model:TritGgufLM"
TASKS_FOLDER = Path(__file__).parent / "tasks"


def require_lm_eval() -> None:
    """Raise MissingExtraError if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("evaluate needs lm-eval: pip install 'tritgguf[eval]'")


def register_model() -> None:
    """Register the model `tritgguf` with lm-eval, unless an entry point has done so; MissingExtraError without it."""
    require_lm_eval()
    import lm_eval.models
    from lm_eval.api import registry

    if hasattr(registry, "model_registry"):
        if MODEL_NAME not in registry.model_registry:
            registry.model_registry.register(MODEL_NAME, target=MODEL_CLASS)
        return
    from tritgguf.lm_eval.model import TritGgufLM  # older versions take the class itself

    if MODEL_NAME not in registry.MODEL_REGISTRY:
        registry.register_model(MODEL_NAME)(TritGgufLM)
