"""A server that speculates gives the same answers, several tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from serving import RunningServer, running_server

from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.loaded_model import load


def test_answers_with_log_probabilities_and_stop_strings_stay_the_same(
    server: RunningServer, tiny_trit_file: Callable[..., GgufFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = [1 + 0.1 * tokens for tokens in range(65)]  # drafts are worth it even where they are often wrong
    monkeypatch.setattr("tritgguf.generation.speculation._PASS_COSTS", costs)
    model = load(tiny_trit_file("qwen2", 2).path, context=640, parallel=4, threads=2, lookup=True)
    fields: dict[str, Any] = {"model": "tiny", "max_tokens": 80, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    fields |= {"frequency_penalty": -0.5}  # the answer repeats itself, sooner or later
    messages: Any = [{"role": "user", "content": "red green blue red green blue red green"}]
    with running_server(model, alias="tiny") as speculating:
        plain, ours = (one.openai.chat.completions.create(messages=messages, **fields) for one in (server, speculating))
        assert ours.choices == plain.choices
        assert ours.timings["draft_n"] >= ours.timings["draft_n_accepted"] > 0
        assert "draft_n" not in plain.timings
        text = plain.choices[0].message.content
        fields["stop"] = text[len(text) // 2 :][:3]
        plain, ours = (one.openai.chat.completions.create(messages=messages, **fields) for one in (server, speculating))
        assert ours.choices == plain.choices and ours.usage.completion_tokens == plain.usage.completion_tokens
