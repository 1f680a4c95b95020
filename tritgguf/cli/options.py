"""Arguments and options shared by several commands, and those of `convert`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from tritgguf.cli.terminal import note
from tritgguf.errors import TritGgufError
from tritgguf.text_format import parse_bytes


class UsageError(TritGgufError):
    """The command line is wrong, for example because its options contradict each other."""


def option(*names: str, help: str, metavar: str = "N", **settings: Any) -> Any:
    """Return an option whose help shows N, TEXT or FILE instead of the name of a type."""
    return typer.Option(*names, help=help, metavar=metavar, **settings)


SourceModel = Annotated[
    str, typer.Argument(help="A Hugging Face folder, a hub id (org/name), or a GGUF file.", metavar="SOURCE")
]
OutputFile = Annotated[Path, typer.Argument(help="The GGUF file to write.", metavar="OUT.gguf")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead, also of an error.")]
TritFile = Annotated[
    Path,
    typer.Argument(
        help="A GGUF file that `convert` wrote, or its name on the hub: ORG/NAME, ORG/NAME:d2, ORG/NAME:FILE.",
        metavar="FILE.gguf",
    ),
]
InstructionSet = Annotated[
    str | None,
    option(
        "--isa",
        metavar="NAME",
        help="Vector instructions: avx512, avx512-novnni, avx2-vnni, avx2, neon-dotprod or portable.",
        show_default="the best that this processor supports",
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
        help="Bits of a prompt's activations; generated tokens use 16.",
        callback=_check_bits,
    ),
]
DecodeBits = Annotated[
    int,
    option(
        "--decode-bits",
        metavar="8|16",
        help="Bits of generated tokens' activations; 8: more tokens per second of several answers, less accurate.",
        callback=_check_bits,
    ),
]
CacheType = Annotated[
    str | None,
    option("--cache-type", metavar="TYPE", help="Type of the KV cache: f16, f32 or q8_0.", show_default="f16"),
]
_BOTH_NEEDED = "As in llama.cpp; both are needed, with the same type."
KeyType = Annotated[str | None, option("--cache-type-k", "-ctk", metavar="TYPE", help=_BOTH_NEEDED, show_default=False)]
ValueType = Annotated[
    str | None, option("--cache-type-v", "-ctv", metavar="TYPE", help=_BOTH_NEEDED, show_default=False)
]


def one_cache_type(both: str | None, keys: str | None, values: str | None) -> str | None:
    """Return the type of a cache for `--cache-type`, `-ctk` and `-ctv`; UsageError where keys and values differ."""
    if keys is None and values is None:
        return both
    if keys != values or both not in (None, keys):
        given = {"--cache-type": both, "-ctk": keys, "-ctv": values}
        found = ", ".join(f"{name} {kind}" for name, kind in given.items() if kind is not None)
        raise UsageError(f"{found}: keys and values are kept in one type; give --cache-type TYPE alone")
    return keys


_MOST_THREADS = 1024  # more would take minutes for a token


def _check_threads(threads: int | None) -> int | None:
    """Return None for 0 and less, which mean the default as in llama.cpp; warn of more threads than processors."""
    if threads is None or threads < 1:
        return None
    if threads > _MOST_THREADS:
        raise UsageError(f"--threads {threads}: give at most {_MOST_THREADS}")
    from cpu_kernels.threads.cores import physical_cores

    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processors = min(processors, 2 * physical_cores())  # a container's quota may allow fewer than the machine has
    if threads > processors:
        note(f"warning: {threads} threads on {processors} processors wait for one another; that is far slower")
    return threads


Threads = Annotated[
    int | None,
    option(
        "--threads",
        "-t",
        "-j",
        help="Number of threads; 0 or less: the default.",
        show_default="the physical cores",
        callback=_check_threads,
    ),
]
Lookup = Annotated[
    bool, typer.Option("--lookup", help="Guess tokens from equal passages of prompt and answer; same answers, sooner.")
]
DraftFile = Annotated[
    Path | None,
    option(
        "--model-draft",
        "-md",
        metavar="FILE",
        help="A smaller trit file with the same vocabulary, which guesses tokens; same answers.",
        show_default=False,
    ),
]
DraftMax = Annotated[int, option("--draft-max", "--draft", min=1, help="Most tokens to guess at once.")]


def check_predict(count: int) -> int:
    """Return the largest length of an answer; -1 and llama.cpp's -2 are no limit. Raises UsageError for less."""
    if count < -2:
        raise UsageError(f"the number of tokens to predict must be 0 or more, or -1 for no limit, not {count}")
    return max(count, -1)


TextFile = Annotated[
    Path | None,
    option(
        "--text", "-f", metavar="FILE", help="Calibrate on this text.", show_default="text that the model generates"
    ),
]
SelfText = Annotated[
    bool, typer.Option("--self", help="Calibrate on text that the model itself generates, without a data set.")
]
_MOST_OWN_TOKENS = 10_000_000  # a small model writes them in some hours
OwnTokens = Annotated[
    int | None,
    option(
        "--own-text",
        min=1,
        max=_MOST_OWN_TOKENS,
        help="Beside --text, also calibrate on N tokens with which the model continues passages of it.",
        show_default=False,
    ),
]
CalibrationTokens = Annotated[
    int | None,
    option(
        "--tokens",
        min=1,
        help="Length of the calibration text.",
        show_default="65536, or 16384 if the model generates it",
    ),
]
TextSeed = Annotated[int, option("--seed", "-s", min=0, help="Seed of the text that the model generates.")]

# Options of `convert`

Depth = Annotated[
    int | None, option("--depth", help="Trits per weight, 1 to 4.", show_default="2, or the recovered depth")
]


def _check_recipe(name: str | None) -> str | None:
    from tritgguf.conversion.recipes import parse_recipe

    if name is not None:
        parse_recipe(name)
    return name


RecipeName = Annotated[
    str | None,
    option(
        "--recipe",
        metavar="NAME",
        help="Output head and embeddings: balanced: packed for about 2 % more loss; small: packed more; published:"
        " F16.",
        show_default="balanced",
        callback=_check_recipe,
    ),
]
OutputDepth = Annotated[
    int | None,
    option("--output-depth", help="Trits per weight of the output head; 0: F16.", show_default="the recipe's"),
]
EmbeddingDepth = Annotated[
    int | None,
    option("--embedding-depth", help="Trits per weight of the embeddings; 0: F16.", show_default="the recipe's"),
]
EncoderName = Annotated[
    str,
    option(
        "--encoder",
        metavar="NAME",
        help="v2: the published codec; best: search all scales; imatrix: search weighted by importance; calibrated:"
        " error feedback on a calibration text; tuned, tuned-end-to-end, tuned-both: see --tune; recover: recover"
        " dequantized trits exactly; recover+v2: v2 for matrices without an exact fit.",
        show_default="recover if the source holds dequantized trits, calibrated at 1 and 2 trits, otherwise best",
    ),
]
ImatrixFile = Annotated[
    Path | None,
    option(
        "--imatrix", metavar="FILE", help="Importance matrix from `calibrate` or llama-imatrix.", show_default=False
    ),
]
KeepRules = Annotated[
    str | None,
    option(
        "--keep",
        metavar="RULES",
        help="Depths of matrices by name, 0 for F16: 'blk.0.*=3,*.ffn_down=3'.",
        show_default=False,
    ),
]
TargetBits = Annotated[
    float | None,
    option("--target-bpw", help="Choose all depths by their measured loss, for an average of N bits per weight."),
]


def _file_size(text: str) -> int:
    count = parse_bytes(text)
    if count is None:
        raise typer.BadParameter(f"{text} is not a size; write it like 900MB or 1.2GB")
    return count


TargetSize = Annotated[
    int | None,
    option(
        "--target-size",
        metavar="SIZE",
        parser=_file_size,
        help="Choose all depths by their measured loss, for a file of at most this size, such as 900MB.",
    ),
]
Sensitivity = Annotated[
    float | None,
    option("--sensitivity", help="Remove a trit from matrices whose error in the block's output stays below N."),
]
Tune = Annotated[
    str | None,
    option(
        "--tune",
        metavar="[WHAT]",
        help="Also train on the text; much slower, worthwhile at depths 1 and 2. WHAT is blocks (each on its own; the"
        " meaning of --tune alone), end-to-end (the whole model, on its predictions), or both, one after the other.",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Resume an interrupted run of the same command, if there is one.")
]
