"""Scores in a file's metadata."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tritgguf.formats.scores import KEY_PREFIX, Score, read_score, text_fingerprint

SCORE = Score(0.125, 1.5, 0.875, 12.5, 11.25, 4096, text_fingerprint("A text."), "org/name", "0123abcd")


def metadata(score: Score) -> dict[str, Any]:
    return {key: value.value for key, value in score.metadata().items()}


@pytest.mark.parametrize("score", [SCORE, Score(0.0, 0.0, 1.0, 1.0, 1.0, 1, "x")])
def test_a_score_is_read_as_it_was_written(score: Score) -> None:
    assert read_score({"general.name": "a", **metadata(score)}) == score


def test_a_file_without_a_score() -> None:
    assert read_score({"trit.version": 1}) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kl_mean", math.nan),
        ("kl_p99", math.inf),
        ("kl_mean", -1.0),
        ("kl_mean", "0.1"),
        ("kl_mean", [0.1]),
        ("top1_agreement", 1.5),
        ("perplexity", 3),
        ("tokens", 0),
        ("tokens", True),
        ("tokens", 5.0),
        ("text", 5),
        ("revision", ["a"]),
    ],
)
def test_a_damaged_score_is_none(name: str, value: Any) -> None:
    assert read_score({**metadata(SCORE), KEY_PREFIX + name: value}) is None


@pytest.mark.parametrize(
    "name", ["kl_mean", "kl_p99", "top1_agreement", "perplexity", "perplexity_reference", "tokens", "text"]
)
def test_a_part_of_a_score_is_none(name: str) -> None:
    values = metadata(SCORE)
    del values[KEY_PREFIX + name]
    assert read_score(values) is None


def test_a_fingerprint_is_sha256_of_utf_8() -> None:
    assert text_fingerprint("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert text_fingerprint("ä") != text_fingerprint("a")
