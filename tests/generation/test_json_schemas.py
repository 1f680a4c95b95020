"""Answers of a model with random weights to random JSON schemas: what it finishes is valid, says jsonschema."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from json_schemas import random_schema

from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.generate import generate
from tritgguf.generation.loaded_model import LoadedModel, load

SCHEMAS = int(os.environ.get("TRITGGUF_SCHEMAS", "30"))
VALIDATOR = jsonschema.Draft202012Validator
WILD: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@pytest.fixture(scope="module", params=["llama", "llama-sentencepiece"])
def model(request: pytest.FixtureRequest, tiny_trit_file: Callable[..., GgufFile]) -> LoadedModel:
    pytest.importorskip("llguidance")
    return load(tiny_trit_file(request.param).path, context=1024)


def towards_an_end(model: LoadedModel) -> dict[int, float]:
    """Return a bias for what closes strings, lists and objects: a model without sense would go on for long."""
    closing = [model.tokenizer.encode(f"a{text}", add_special=False, parse_special=False)[-1] for text in '"]}']
    return dict.fromkeys(closing, 4.0)


def test_what_is_finished_is_valid(model: LoadedModel) -> None:
    bias, finished = towards_an_end(model), 0
    for seed in range(SCHEMAS):
        schema = random_schema(seed)
        answer = generate(model, "x", json_schema=schema, max_tokens=400, seed=seed, logit_bias=bias, **WILD)
        if answer.finish_reason == "length":
            continue
        finished += 1
        validator = VALIDATOR(schema, format_checker=VALIDATOR.FORMAT_CHECKER)
        error = next(validator.iter_errors(json.loads(answer.text)), None)
        assert error is None, (seed, schema, answer.text, error)
    assert finished >= 0.8 * SCHEMAS
