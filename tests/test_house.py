"""Limits of length: no file over 400 lines, no function over 60, signature and docstring included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("tritgguf", "cpu_kernels", "tools", "tests")
MOST_LINES_OF_FILE, MOST_LINES_OF_FUNCTION = 400, 60


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_too_long(folder: str) -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text("utf-8").splitlines()) for path in python_files(folder)}
    assert lengths, f"{folder} has no Python files"
    too_long = [f"{path}: {lines} lines" for path, lines in lengths.items() if lines > MOST_LINES_OF_FILE]
    assert not too_long, "\n".join(too_long)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_function_is_too_long(folder: str) -> None:
    too_long = []
    for path in python_files(folder):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                if lines > MOST_LINES_OF_FUNCTION:
                    too_long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert not too_long, "\n".join(too_long)
