"""The files that are compared: ours and llama.cpp's, of one shape, with F16 head and embeddings."""

from __future__ import annotations

import sys
from pathlib import Path

from gguf import GGMLQuantizationType

from tools.models.random_block_model import write_block_model
from tools.models.random_model import SHAPES
from tools.models.random_packed_model import write_packed_model
from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.gguf_header import F16

ROOT = Path(__file__).resolve().parents[2]


def has_no_source(shape: str) -> bool:
    """Tell whether files of a shape are written from random blocks: an F16 file of a mixture would not fit the disk."""
    return SHAPES[shape][1].experts is not None


def write_blocks(shape: str, output: Path, type_name: str) -> None:
    """Write a file of random blocks of a type: `trit1` to `trit4`, or one of llama.cpp's, as `q3_k_s`."""
    architecture, sizes = SHAPES[shape]
    if type_name.startswith("trit"):
        write_packed_model(output, architecture, sizes, depth=int(type_name.removeprefix("trit")))
    else:
        type_id = GGMLQuantizationType[_type_of(type_name)]
        write_block_model(output, architecture, sizes, type_id)


def _type_of(name: str) -> str:
    return name.upper().removesuffix("_S")


def check_types(path: Path, name: str) -> None:
    """Raise TritGgufError unless all matrices of the layers have the type and head and embeddings are F16."""
    expected = _type_of(name)
    for info in GgufFile(path).tensors.values():
        if quantized_tensor(info.name) and info.type_name != expected:
            raise TritGgufError(f"{path}: tensor {info.name} is {info.type_name}, not {expected}")
        if info.name in ("token_embd.weight", "output.weight") and info.type_id != F16:
            raise TritGgufError(f"{path}: tensor {info.name} is {info.type_name}, not F16")


def our_program(module: str, call: str) -> list[str]:
    """Return a command that evaluates `call` of this checkout's module, which has a `main`, in any folder."""
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import typer; from {module} import main; {call}"
    return [sys.executable, "-c", start]


def our_command() -> list[str]:
    """Return a command that runs this checkout's `tritgguf` from any folder."""
    return our_program("tritgguf.__main__", "sys.exit(main())")
