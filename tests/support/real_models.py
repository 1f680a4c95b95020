"""The folder of the real models that some tests read."""

from pathlib import Path

MODELS = Path(__file__).parents[2] / "models"
