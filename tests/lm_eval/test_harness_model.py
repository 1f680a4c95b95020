"""The model of lm-eval: the likelihoods of transformers and of the server, and everything else that tasks ask for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from serving import running_server
from tiny_models import write_tiny_model

from tritgguf import convert, generate
from tritgguf.errors import BadRequestError, TritGgufError
from tritgguf.evaluation.verify import verify
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.loaded_model import LoadedModel, load
from tritgguf.reference.model import ReferenceModel
from tritgguf.sources.open import open_source

pytest.importorskip("lm_eval")

from tritgguf.lm_eval.model import TritGgufLM  # it needs lm-eval

CONTEXT = "Name three primary colors: red, blue and yellow. " * 4
PAIRS = [
    ("The quick brown fox", " jumps over"),
    ("The quick brown fox", " sleeps"),
    ("The quick brown fox", " 12 <|im_end|>"),
    ("Weights are sums of ", "ternary digits"),
    (CONTEXT + "The dog", " sleeps on."),
    (CONTEXT + "The dog", " reads text"),
    (CONTEXT, "A"),
    (CONTEXT, "B"),
    ("", "A model reads text"),
]


class Asked:
    """A request, as lm-eval's instances have it."""

    def __init__(self, *arguments: Any) -> None:
        self.args = arguments


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("source") / "tiny", max_position_embeddings=512)


@pytest.fixture(scope="module")
def file(source: Path) -> Path:
    convert(source, source.parent / "tiny.gguf", depth=2)
    return source.parent / "tiny.gguf"


@pytest.fixture(scope="module")
def exact(file: Path) -> LoadedModel:
    return load(file, exact=True, parallel=4)


@pytest.fixture(scope="module")
def transformers_lm(source: Path, file: Path) -> Any:
    """lm-eval's own model `hf` with the file's dequantized weights, in float32."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    transformers = pytest.importorskip("transformers")
    reference = ReferenceModel.open(open_source(str(source)))
    reference.load_file(GgufFile(file))
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    return huggingface.HFLM(pretrained=reference.module, tokenizer=tokenizer, device="cpu", batch_size=4)


def test_transformers_gives_the_same_likelihoods(exact: LoadedModel, transformers_lm: Any) -> None:
    requests = [Asked(*pair) for pair in PAIRS]
    found = TritGgufLM(exact).loglikelihood(requests)
    expected = transformers_lm.loglikelihood(requests)
    for (value, is_greedy), (reference, reference_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(reference, rel=1e-4)
        assert is_greedy is bool(reference_greedy)


def test_activations_of_fewer_bits_are_near(file: Path, exact: LoadedModel) -> None:
    requests = [Asked(*pair) for pair in PAIRS]
    expected = TritGgufLM(exact).loglikelihood(requests)
    for bits, tolerance in ((16, 1e-2), (8, 1e-1)):
        found = TritGgufLM(file, prefill_bits=bits).loglikelihood(requests)
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=tolerance)
        assert found != expected


def test_the_server_gives_the_same_likelihoods(exact: LoadedModel) -> None:
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    pairs = [pair for pair in PAIRS if pair[0] and "<|" not in pair[1]]  # a client cannot send control tokens
    requests = [Asked(*pair) for pair in pairs]
    with running_server(exact, alias="tiny") as running:
        url = f"{running.url}/v1/completions"
        client = completions.LocalCompletionsAPI(
            model="tiny", base_url=url, tokenizer_backend="remote", num_concurrent=2, max_length=500
        )
        expected = client.loglikelihood(requests)
    found = TritGgufLM(exact).loglikelihood(requests)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-4)
    assert [is_greedy for _, is_greedy in found] == [bool(is_greedy) for _, is_greedy in expected]


def test_whole_texts_have_the_likelihoods_of_transformers(exact: LoadedModel, transformers_lm: Any) -> None:
    texts = [Asked("A model reads text as tokens."), Asked(CONTEXT * 9), Asked("a")]
    found = TritGgufLM(exact).loglikelihood_rolling(texts)
    assert found == pytest.approx(transformers_lm.loglikelihood_rolling(texts), rel=1e-4)


def test_whole_texts_have_the_perplexity_of_verify(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "tiny", "llama-sentencepiece", max_position_embeddings=512)
    convert(source, tmp_path / "tiny.gguf", depth=2)
    text = CONTEXT * 2
    report = verify(source, tmp_path / "tiny.gguf", text=text)
    lm = TritGgufLM(tmp_path / "tiny.gguf", exact=True)
    tokens = len(lm.tok_encode(text, add_special_tokens=False))
    assert (report.windows, report.tokens) == (1, tokens + 1)  # BOS stands before the text in both
    [log_likelihood] = lm.loglikelihood_rolling([Asked(text)])
    assert math.exp(-log_likelihood / tokens) == pytest.approx(report.perplexity, rel=1e-4)


def test_answers_are_those_of_generate(exact: LoadedModel) -> None:
    options = {"until": ["zz"], "max_gen_toks": 12}
    prompts = [f"{number} dogs and" for number in range(12)]
    answers = TritGgufLM(exact).generate_until([Asked(prompt, options) for prompt in prompts])
    assert answers == [
        generate(exact, prompt, raw=True, max_tokens=12, temperature=0, repeat_penalty=1).text for prompt in prompts
    ]
    assert len(set(answers)) > 6


def test_an_answer_ends_before_the_text_that_ends_it(exact: LoadedModel) -> None:
    lm = TritGgufLM(exact)
    [whole] = lm.generate_until([Asked("The dog", {"until": [], "max_gen_toks": 12})])
    end = whole[len(whole) // 2 :][:3]
    assert len(end) == 3
    [answer] = lm.generate_until([Asked("The dog", {"until": [end], "max_gen_toks": 12})])
    assert answer == whole[: whole.index(end)]


def test_a_context_that_is_too_long_loses_its_beginning_and_says_so(
    file: Path, transformers_lm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    lm = TritGgufLM(file, max_length=20, exact=True)
    tokens = lm.tok_encode(CONTEXT)
    asked = [Asked(CONTEXT, " dogs")]
    [(value, _)] = lm.loglikelihood(asked)
    assert "1 contexts are longer than 20 tokens" in caplog.text
    answer = lm.tok_encode(CONTEXT + " dogs")[len(lm.tok_encode(CONTEXT.rstrip())) :]
    kept = lm.tok_encode(CONTEXT.rstrip())[-(21 - len(answer)) :]
    [(expected, _)] = transformers_lm._loglikelihood_tokens([(None, kept, answer)])
    assert value == pytest.approx(expected, rel=1e-4)
    caplog.clear()
    assert len(tokens) > 20
    lm.generate_until([Asked(CONTEXT, {"until": [], "max_gen_toks": 4})])
    assert "beginnings are cut off" in caplog.text


def test_chats_are_rendered_as_transformers_does(exact: LoadedModel, transformers_lm: Any) -> None:
    chat = [
        {"role": "user", "content": "Name a color."},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "Another."},
    ]
    lm = TritGgufLM(exact)
    assert lm.apply_chat_template(chat) == transformers_lm.apply_chat_template(chat)
    begun = [*chat, {"role": "assistant", "content": "The answer is"}]
    assert lm.apply_chat_template(begun, False) == transformers_lm.apply_chat_template(begun, False)
    assert lm.chat_template(True) == exact.chat_template
    assert lm.chat_template(False) is None
    assert lm.tok_encode(lm.apply_chat_template(chat)) == transformers_lm.tok_encode(lm.apply_chat_template(chat))


def test_impossible_settings_are_refused(file: Path, exact: LoadedModel) -> None:
    with pytest.raises(TritGgufError, match="prefill"):
        TritGgufLM(file, prefill_bits=4)
    lm = TritGgufLM(exact)
    with pytest.raises(BadRequestError, match="has one chat template"):
        lm.chat_template("tool_use")
    with pytest.raises(BadRequestError, match="no tokens of its own"):
        lm._loglikelihood_tokens([(None, [1], [])])
    with pytest.raises(BadRequestError, match="max_gen_toks"):
        lm.generate_until([Asked("a", {"max_gen_toks": 512})])
    with pytest.raises(BadRequestError, match="num_beams"):
        lm.generate_until([Asked("a", {"num_beams": 4})])
