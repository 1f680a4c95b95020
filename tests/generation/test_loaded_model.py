"""Logits, scores and embeddings: the bits of the forward pass, whatever the engine has stored before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loopback_hub import loopback_hub, use_hub
from scripted_model import scripted
from sequences import open_sequence

from tritgguf.errors import BadRequestError, ContextFullError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.generate import generate
from tritgguf.generation.loaded_model import LoadedModel, load
from tritgguf.generation.request import Request
from tritgguf.generation.sampling import Sampler, SamplingOptions

Files = Callable[..., GgufFile]
TOKENS = [5, 401, 17, 17, 300, 0, 447, 62, 128, 33, 254]
LONG = np.random.default_rng(1).integers(3, 440, 600).tolist()


@pytest.fixture(scope="module")
def model(tiny_trit_file: Files) -> LoadedModel:
    return load(tiny_trit_file().path, context=700, parallel=4)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normal: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normal


def test_a_name_on_the_hub_is_fetched_once(
    tiny_trit_file: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with loopback_hub() as hub:
        use_hub(monkeypatch, hub, tmp_path)
        hub.models["org/tiny"] = {
            f"tiny-d{depth}.gguf": tiny_trit_file("llama", depth).path.read_bytes() for depth in (2, 3)
        }
        stages = list[tuple[str, int, int]]()
        fetched = load("org/tiny:d3", context=64, on_download=lambda *stage: stages.append(stage))
        assert fetched.path.is_relative_to(tmp_path)
        assert stages[-1][1] == stages[-1][2] == fetched.path.stat().st_size
        np.testing.assert_array_equal(fetched.logits(TOKENS), load(tiny_trit_file("llama", 3).path).logits(TOKENS))
        load(Path("org/tiny:d3"), context=64, draft="org/tiny:d2")
        assert len(hub.downloads()) == 2
        with pytest.raises(BadRequestError, match="has 2 trit files"):
            load("org/tiny")


# -- logits


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:1], LONG], ids=["some", "one", "many"])
def test_logits_are_those_of_a_prompt_to_the_bit(model: LoadedModel, tiny_trit_file: Files, tokens: list[int]) -> None:
    model.engine.clear_prefix_cache()
    sequence = open_sequence(tiny_trit_file(), context=700)
    expected = sequence.forward(tokens, all_logits=True, generated=False)
    found = model.logits(tokens)
    assert found.dtype == np.float32
    assert found.shape == (len(tokens), 448)
    np.testing.assert_array_equal(found, expected)
    for first in {0, len(tokens) // 2, len(tokens) - 1}:
        np.testing.assert_array_equal(model.logits(tokens, first=first), expected[first:])
    np.testing.assert_array_equal(model.logits(np.array(tokens)), expected)  # type: ignore[arg-type]
    model.engine.check()


def test_logits_of_a_text(model: LoadedModel) -> None:
    tokens = model.tokenizer.encode("The dog sleeps", add_special=True, parse_special=False)
    np.testing.assert_array_equal(model.logits("The dog sleeps"), model.logits(tokens))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "the prompt is empty"),
        ("", "the prompt is empty"),
        ([448], "tokens must be from 0 to 447"),
        ([-1], "tokens must be from 0 to 447"),
        ([1 << 80], "tokens must be from 0 to 447"),
        ([1.5], "a text or a list of token ids is needed"),
        (["a"], "a text or a list of token ids is needed"),
        (5, "a text or a list of token ids is needed"),
        (None, "a text or a list of token ids is needed"),
    ],
)
def test_what_has_no_logits(model: LoadedModel, tokens: Any, message: str) -> None:
    for ask in (model.logits, model.embed):
        with pytest.raises(BadRequestError, match=message):
            ask(tokens)
    model.engine.check()


def test_more_tokens_than_the_context_holds(model: LoadedModel) -> None:
    with pytest.raises(ContextFullError, match="the prompt has 701 tokens, the context holds 700"):
        model.logits([1] * 701)


@pytest.mark.parametrize("first", [-1, 3, 100])
def test_logits_that_begin_outside(model: LoadedModel, first: int) -> None:
    with pytest.raises(BadRequestError, match="the first output must be one of tokens 0 to 2"):
        model.logits([1, 2, 3], first=first)


@pytest.mark.parametrize("start", [0, 1, 100, 255, 256, 257, 512, 599, 600])
def test_a_stored_beginning_does_not_change_a_bit(model: LoadedModel, start: int) -> None:
    def ask() -> list[Any]:
        score = model.score(LONG[:500], LONG[500:])
        return [model.logits(LONG, first=590), model.embed(LONG), model.embed(LONG, pooling="last"), score]

    model.engine.clear_prefix_cache()
    expected = []
    for ask_one in range(4):  # each on its own
        model.engine.clear_prefix_cache()
        expected.append(ask()[ask_one])
    model.engine.clear_prefix_cache()
    if start:
        model.logits([*LONG[:start], 1], first=start)
    for _ in range(2):
        found = ask()
        for found_one, expected_one in zip(found, expected, strict=True):
            np.testing.assert_equal(found_one, expected_one)
    model.engine.check()


def test_generated_tokens_that_are_stored_do_not_change_a_bit(model: LoadedModel) -> None:
    """Logits are those of a prompt, whatever was generated before; a chat goes on from its answer all the same."""
    model.engine.clear_prefix_cache()
    options: dict[str, Any] = {"raw": True, "max_tokens": 20, "temperature": 0}
    answer = generate(model, "The dog", **options)
    tokens = [*answer.prompt_tokens, *answer.tokens]
    found, embedding = model.logits(tokens, first=len(tokens) - 2), model.embed(tokens)
    request = model.engine.submit(Request([*tokens, 5], Sampler(SamplingOptions()), max_tokens=1))
    list(model.engine.tokens(request))
    assert request.cached >= len(tokens) - 1
    model.engine.clear_prefix_cache()
    np.testing.assert_array_equal(found, model.logits(tokens, first=len(tokens) - 2))
    model.engine.clear_prefix_cache()
    np.testing.assert_array_equal(embedding, model.embed(tokens))
    model.engine.check()


# -- scores


def test_a_score_is_the_log_softmax_of_the_logits(model: LoadedModel) -> None:
    expected = log_softmax(model.logits(TOKENS))
    for border in range(1, len(TOKENS)):
        score = model.score(TOKENS[:border], TOKENS[border:])
        places = np.arange(border - 1, len(TOKENS) - 1)
        assert score.tokens == TOKENS[border:]
        np.testing.assert_allclose(score.log_probabilities, expected[places, TOKENS[border:]], rtol=1e-12)
        assert score.log_probability == sum(score.log_probabilities) < 0
        assert not score.is_greedy


def test_a_greedy_continuation_is_told(model: LoadedModel) -> None:
    tokens = list(TOKENS)
    for _ in range(5):
        tokens.append(int(model.logits(tokens)[-1].argmax()))
    assert model.score(TOKENS, tokens[len(TOKENS) :]).is_greedy
    tokens[-1] = (tokens[-1] + 1) % 448
    assert not model.score(TOKENS, tokens[len(TOKENS) :]).is_greedy


def test_a_score_of_two_texts_is_that_of_their_tokens(model: LoadedModel) -> None:
    def encode(text: str) -> list[int]:
        return model.tokenizer.encode(text, add_special=True, parse_special=False)

    score = model.score("The dog", " sleeps on")
    assert score.tokens == encode("The dog sleeps on")[len(encode("The dog")) :]
    assert score == model.score(encode("The dog"), score.tokens)
    assert score == model.score("The dog", score.tokens)
    assert model.score(encode("The dog"), " sleeps").tokens == encode(" sleeps")


def test_a_token_across_the_border_belongs_to_the_continuation(model: LoadedModel) -> None:
    def encode(text: str) -> list[int]:
        return model.tokenizer.encode(text, add_special=True, parse_special=False)

    text = "The quick brown fox jumps over the lazy dog"
    whole, crossed = encode(text), 0
    for border in range(1, len(text)):
        score = model.score(text[:border], text[border:])
        before = whole[: len(whole) - len(score.tokens)]
        assert [*before, *score.tokens] == whole
        assert before == encode(text[:border])[: len(before)]
        crossed += before != encode(text[:border])
    assert crossed


def test_a_score_without_a_prompt_begins_with_bos(model: LoadedModel) -> None:
    bos = model.tokenizer.bos_id
    assert bos is not None
    expected = model.score([bos], TOKENS)
    assert model.score([], TOKENS) == expected
    assert model.score("", TOKENS) == expected
    tokens = model.tokenizer.encode("The dog", add_special=False, parse_special=False)
    assert model.score("", "The dog") == model.score([bos], tokens)


def test_a_score_without_a_prompt_needs_bos() -> None:
    without = scripted("")
    without.tokenizer.bos_id = None
    with pytest.raises(BadRequestError, match="no BOS token, so a score needs a prompt"):
        without.score([], TOKENS)


@pytest.mark.parametrize(("prompt", "continuation"), [("The", ""), ("The", []), ([1], []), ("", ""), ([], [])])
def test_an_empty_continuation(model: LoadedModel, prompt: Any, continuation: Any) -> None:
    with pytest.raises(BadRequestError, match="the continuation has no tokens"):
        model.score(prompt, continuation)


@pytest.mark.parametrize(
    ("prompt", "continuation"), [(5, "a"), ("a", 5), ([1], ["a"]), ([448], [1]), ([1], [2, 448, 3])]
)
def test_a_score_of_what_are_no_tokens(model: LoadedModel, prompt: Any, continuation: Any) -> None:
    with pytest.raises(BadRequestError):
        model.score(prompt, continuation)
    model.engine.check()


@pytest.mark.parametrize("token", [448, -1, 1 << 80])
def test_a_continuation_that_ends_with_a_token_that_does_not_exist(model: LoadedModel, token: int) -> None:
    """The last token is not evaluated, only looked up."""
    with pytest.raises(BadRequestError, match="tokens must be from 0 to 447"):
        model.score([1], [2, token])


def test_a_score_that_just_fits(model: LoadedModel) -> None:
    """The last token needs no place: nothing is computed behind it."""
    assert len(model.score(LONG, [7] * 101).tokens) == 101
    with pytest.raises(ContextFullError):
        model.score(LONG, [7] * 102)


# -- embeddings


def test_an_embedding_is_a_mean_or_the_last(model: LoadedModel, tiny_trit_file: Files) -> None:
    raw = {pooling: model.embed(TOKENS, pooling=pooling, normalize=False) for pooling in ("mean", "last")}
    last = [model.embed(TOKENS[: count + 1], pooling="last", normalize=False) for count in range(len(TOKENS))]
    np.testing.assert_array_equal(raw["last"], last[-1])
    np.testing.assert_allclose(raw["mean"], np.mean(last, axis=0, dtype=np.float64), rtol=1e-5, atol=1e-6)
    head, expected = tiny_trit_file().read_float32("output.weight"), model.logits(TOKENS)[-1]
    np.testing.assert_allclose(head @ raw["last"], expected, rtol=0, atol=0.02 * np.abs(expected).max())
    for pooling, embedding in raw.items():
        unit = model.embed(TOKENS, pooling=pooling)  # type: ignore[arg-type]
        assert unit.dtype == np.float32
        assert unit.shape == (128,)
        assert np.linalg.norm(unit.astype(np.float64)) == pytest.approx(1, abs=1e-6)
        np.testing.assert_allclose(unit, embedding / np.linalg.norm(embedding), rtol=1e-5, atol=1e-7)
    assert not np.allclose(raw["mean"], raw["last"])


def test_an_embedding_of_a_text_is_always_the_same(model: LoadedModel) -> None:
    first, again, other = model.embed("The dog"), model.embed("The dog"), model.embed("The fox")
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_an_unknown_pooling(model: LoadedModel) -> None:
    with pytest.raises(BadRequestError, match=r'^pooling is "mean" or "last", not .max.$'):
        model.embed("The dog", pooling="max")  # type: ignore[arg-type]
