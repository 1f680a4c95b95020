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
        raise MissingExtraError("evaluate needs lm-eval: pip install lm-eval")


def register_model() -> None:
    """Register the model `tritgguf` with lm-eval, unless an entry point has done so; MissingExtraError without it."""
    require_lm_eval()
    from lm_eval import models  # noqa: F401  # which fills the registry
    from lm_eval.api.registry import model_registry

    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target=MODEL_CLASS)
