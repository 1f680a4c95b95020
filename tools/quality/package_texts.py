"""Disjoint texts for calibration and evaluation, the same on every machine with the pinned packages.

They are package descriptions (METADATA without its header, which is much the same everywhere) and documentation of
Python's standard library: prose, lists, tables and code. A hash of its name assigns each package or module to one side.
Paragraphs of the evaluation side that also occur on the calibration side are left out.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

WINDOW_TOKENS = 512
# Fixed, so that a new dependency does not change the texts that the figures in docs/ were measured on. Names that stand
# twice count twice, as they did then.
_PACKAGES = """
    accelerate annotated-doc annotated-doc annotated-types anyio ast-serialize certifi charset-normalizer
    click execnet filelock filelock fsspec gguf grimp grimp h11 hf-xet httpcore2 httpcore2 httpx2 httpx2
    huggingface-hub hypothesis hypothesis idna import-linter import-linter iniconfig jinja2 librt llvmlite
    markdown-it-py markupsafe mdurl mpmath mypy-extensions mypy networkx networkx numba numpy numpy packaging
    pathspec pluggy psutil pydantic-core pydantic pygments pytest-xdist pytest pyyaml regex regex requests
    rich ruff safetensors setuptools shellingham sortedcontainers sympy tokenizers tomli torch tqdm
    transformers transformers truststore typer typer typing-extensions typing-inspection urllib3 xxhash
""".split()  # noqa: SIM905 - a list literal would be one line of a thousand characters
_MOST_CHARACTERS = 40_000  # per package or module, so that none dominates
_EVALUATION_SHARE = 3  # one in this many packages and modules


def texts() -> tuple[str, str]:
    """Return the calibration text and the evaluation text."""
    sides: tuple[list[str], list[str]] = ([], [])
    for name, text in [*_descriptions(), *_docstrings()]:
        is_evaluation = hashlib.sha256(name.encode()).digest()[0] % _EVALUATION_SHARE == 0
        sides[is_evaluation].append(text[:_MOST_CHARACTERS])
    calibration, evaluation = ("\n\n".join(side) for side in sides)
    known = set(_paragraphs(calibration))
    return calibration, "\n\n".join(part for part in _paragraphs(evaluation) if part not in known)


def windows_of(text: str, tokenizer: Tokenizer, count: int, tokens: int = WINDOW_TOKENS) -> list[list[int]]:
    """Return `count` evenly spaced windows of tokens; they overlap if the text is too short."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [ids[start : start + tokens] for start in np.linspace(0, len(ids) - tokens, count).astype(int)]


def fingerprint(windows: Sequence[Sequence[int]]) -> str:
    """Return a hash of windows, which identifies the text of a result."""
    return hashlib.sha256(np.array(windows, np.int64).tobytes()).hexdigest()[:16]


def _descriptions() -> Iterator[tuple[str, str]]:
    """Yield name and description of every package of the list that is installed."""
    for name in _PACKAGES:
        try:
            yield name, str(distribution(name).read_text("METADATA")).partition("\n\n")[2]
        except PackageNotFoundError:
            continue


def _docstrings() -> Iterator[tuple[str, str]]:
    """Yield name and docstrings of every single-file module of the standard library."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        found = [
            text
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node))
        ]
        yield path.stem, "\n\n".join(found)


def _paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", text) if part.strip()]
