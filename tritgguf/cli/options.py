"""The arguments and options that several commands share, and how an option is made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def option(*names: str, help: str, metavar: str = "N", **settings: Any) -> Any:
    """Return an option whose help line says N, TEXT or FILE instead of a type's name."""
    return typer.Option(*names, help=help, metavar=metavar, **settings)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
TritFile = Annotated[Path, typer.Argument(help="A GGUF file that `convert` wrote.", metavar="FILE.gguf")]
InstructionSet = Annotated[
    str | None,
    option(
        "--isa",
        metavar="NAME",
        help="Vector instructions: avx512, avx512-novnni, avx2-vnni, avx2 or portable.",
        show_default="the best that works here",
    ),
]


def _check_bits(bits: int) -> int:
    if bits not in (8, 16):
        raise typer.BadParameter("it must be 8 or 16")
    return bits


PrefillBits = Annotated[
    int,
    option(
        "--prefill-bits",
        metavar="8|16",
        help="Bits of the activations of a prompt; generated tokens have 16.",
        callback=_check_bits,
    ),
]
CacheType = Annotated[
    str | None,
    option("--cache-type", metavar="TYPE", help="Keys and values in memory: f16 or f32.", show_default="f16"),
]
Threads = Annotated[
    int | None, option("--threads", "-t", "-j", min=1, help="Number of threads.", show_default="the physical cores")
]
TextFile = Annotated[
    Path | None,
    option("--text", "-f", metavar="FILE", help="Calibrate on this text.", show_default="text of the model's own"),
]
OwnText = Annotated[
    bool, typer.Option("--self", help="Calibrate on text that the model itself writes, which needs no data set.")
]
CalibrationTokens = Annotated[
    int | None,
    option(
        "--tokens",
        min=1,
        help="Length of the calibration text.",
        show_default="65536, or 16384 of text that the model writes",
    ),
]
TextSeed = Annotated[int, option("--seed", "-s", min=0, help="Of the text that the model itself writes.")]
