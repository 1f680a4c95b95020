"""Balanced-ternary language models in GGUF files: convert, run, verify.

    import tritgguf

    tritgguf.convert("models/SmolLM2-135M-Instruct", "smollm2-d3.gguf", depth=3)
    model = tritgguf.load("smollm2-d3.gguf")
    print(tritgguf.generate(model, "Name three primary colors.").text)
    print(tritgguf.verify("models/SmolLM2-135M-Instruct", "smollm2-d3.gguf").as_dict())

Public names are imported lazily: `import tritgguf` is fast, and only `verify` needs torch. Importing this package also
registers the trit types with gguf-py, so that its reader and tools know them (docs/bridges.md).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tritgguf.formats.trit_types import register_when_gguf_is_imported
from tritgguf.version import __version__ as __version__

if TYPE_CHECKING:
    from tritgguf.conversion.convert import ConvertProgress, convert
    from tritgguf.conversion.report import ConvertReport
    from tritgguf.errors import (
        BadRequestError,
        ContextFullError,
        DamagedFileError,
        MissingExtraError,
        TritGgufError,
    )
    from tritgguf.evaluation.verify import VerifyReport, verify, verify_files
    from tritgguf.exporters.export import ExportReport, export
    from tritgguf.generation.chat import Chat
    from tritgguf.generation.generate import generate
    from tritgguf.generation.loaded_model import LoadedModel, load
    from tritgguf.generation.result import Generation
    from tritgguf.generation.sampling import SamplingOptions

__all__ = [
    "BadRequestError",
    "Chat",
    "ContextFullError",
    "ConvertProgress",
    "ConvertReport",
    "DamagedFileError",
    "ExportReport",
    "Generation",
    "LoadedModel",
    "MissingExtraError",
    "SamplingOptions",
    "TritGgufError",
    "VerifyReport",
    "convert",
    "export",
    "generate",
    "load",
    "verify",
    "verify_files",
]

_MODULES = {
    "BadRequestError": "errors",
    "Chat": "generation.chat",
    "ContextFullError": "errors",
    "ConvertProgress": "conversion.convert",
    "ConvertReport": "conversion.report",
    "DamagedFileError": "errors",
    "ExportReport": "exporters.export",
    "Generation": "generation.result",
    "LoadedModel": "generation.loaded_model",
    "MissingExtraError": "errors",
    "SamplingOptions": "generation.sampling",
    "TritGgufError": "errors",
    "VerifyReport": "evaluation.verify",
    "convert": "conversion.convert",
    "export": "exporters.export",
    "generate": "generation.generate",
    "load": "generation.loaded_model",
    "verify": "evaluation.verify",
    "verify_files": "evaluation.verify",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first access."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, including those not imported yet."""
    return sorted([*__all__, "__version__"])


register_when_gguf_is_imported()
