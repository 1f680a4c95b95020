"""Balanced-ternary language models in GGUF files: convert, run, verify.

    import tritgguf

    tritgguf.convert("models/SmolLM2-135M-Instruct", "smollm2-d3.gguf", depth=3)
    model = tritgguf.load("smollm2-d3.gguf")
    print(tritgguf.generate(model, "Name three primary colors.").text)
    print(tritgguf.verify("models/SmolLM2-135M-Instruct", "smollm2-d3.gguf").as_dict())

Nothing is imported before it is used: `import tritgguf` takes no time, and only `verify` needs torch. gguf-py's own
reader and tools know the trit types in a program that imports this package (docs/bridges.md).
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tritgguf.trit_types import register_when_gguf_is_imported

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tritgguf.convert import ConvertProgress, ConvertReport, convert
    from tritgguf.errors import TritGgufError
    from tritgguf.export import ExportReport, export
    from tritgguf.generate import Chat, Generation, LoadedModel, generate, load
    from tritgguf.sampling import SamplingOptions
    from tritgguf.verify import VerifyReport, verify

__all__ = [
    "Chat",
    "ConvertProgress",
    "ConvertReport",
    "ExportReport",
    "Generation",
    "LoadedModel",
    "SamplingOptions",
    "TritGgufError",
    "VerifyReport",
    "convert",
    "export",
    "generate",
    "load",
    "verify",
]

_MODULES = {
    "convert": ("ConvertProgress", "ConvertReport", "convert"),
    "errors": ("TritGgufError",),
    "export": ("ExportReport", "export"),
    "generate": ("Chat", "Generation", "LoadedModel", "generate", "load"),
    "sampling": ("SamplingOptions",),
    "verify": ("VerifyReport", "verify"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps `tritgguf.convert`, `.export`, `.generate` and `.verify` the functions that they are named after.

    Importing a submodule binds it to the package under its own name, which would replace the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

register_when_gguf_is_imported()
