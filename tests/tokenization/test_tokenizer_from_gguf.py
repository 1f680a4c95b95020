"""Conversion of tokenizers from GGUF keys to tokenizer.json."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from awkward_strings import awkward_strings
from hypothesis import given, settings
from hypothesis import strategies as st
from source_checks import tokenizer_values
from tiny_models import edit_json, tiny_tokenizer_json, write_tokenizer_folder
from tokenizers import Tokenizer

from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.tokenization.hf_to_gguf import HUGGINGFACE_JSON_KEY, tokenizer_json_from_gguf

BYTE_LEVEL_KINDS = ("smollm", "gpt-2", "qwen2", "llama-bpe")
TRICKY = (
    "Hello, y'all! I'VE 3 33 3333 3.14 \u0662\u0663 apples\u2026",
    "  two  spaces\n\n\ttab \r\n end ",
    "<|im_start|>user\nHi<|im_end|>\n<tool_call>x",
    "caf\u00e9 cafe\u0301 \u212b \u6211\u60f3 \U0001f680\u200d",
    "",
)
any_text = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("the andr123 \n'.")), max_size=40)

# Ids that a plain implementation of BPE over llama.cpp's regular expressions gives for SmolLM2's vocabulary.
SMOLLM2_IDS = {
    "The year 2024 has 366 days.": [504, 713, 216, 34, 32, 34, 36, 553, 216, 35, 38, 38, 2009, 30],
    "  if x == 10:\n\t\treturn 'caf\u00e9'\r\n": [
        *(216, 585, 1792, 1758, 216, 33, 32, 42, 3354, 197, 5406),
        *(637, 83, 1939, 2756, 23, 2738),
    ],
    "I'VE y'all don't  \uff13\u00bd \u00b2": [
        *(57, 23, 18525, 329, 23, 449, 1326, 982, 256, 8083, 237),
        *(16738, 216, 19133),
    ],
    "<|im_start|>user\nHi<|im_end|>": [1, 4093, 198, 26843, 2],
}


@pytest.fixture(scope="module")
def round_trips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Tokenizer]]:
    """Return tokenizer type -> (the tokenizer, the one made from its GGUF keys)."""
    pairs = {}
    for kind in (*BYTE_LEVEL_KINDS, "sentencepiece"):
        values = tokenizer_values(write_tokenizer_folder(tmp_path_factory.mktemp(kind), kind))
        made = tokenizer_json_from_gguf({k: v for k, v in values.items() if k != HUGGINGFACE_JSON_KEY})
        pairs[kind] = (Tokenizer.from_str(tiny_tokenizer_json(kind)), Tokenizer.from_str(made))
    return pairs


@pytest.mark.parametrize("kind", [*BYTE_LEVEL_KINDS, "sentencepiece"])
@pytest.mark.parametrize("text", TRICKY)
def test_tricky_texts_survive_the_round_trip(
    round_trips: dict[str, tuple[Tokenizer, Tokenizer]], kind: str, text: str
) -> None:
    original, made = round_trips[kind]
    ids = original.encode(text).ids
    assert made.encode(text).ids == ids
    for keep in (True, False):
        assert made.decode(ids, skip_special_tokens=keep) == original.decode(ids, skip_special_tokens=keep)


@given(text=any_text, kind=st.sampled_from([*BYTE_LEVEL_KINDS, "sentencepiece"]))
@settings(deadline=None)
def test_any_text_survives_the_round_trip(
    round_trips: dict[str, tuple[Tokenizer, Tokenizer]], text: str, kind: str
) -> None:
    original, made = round_trips[kind]
    assert made.encode(text).ids == original.encode(text).ids
    assert made.encode(text, add_special_tokens=False).ids == original.encode(text, add_special_tokens=False).ids


def merge_by_score(text: str, tokens: list[str], scores: list[float]) -> list[str]:
    """Tokenize like llama.cpp's SentencePiece: join the neighbors with the highest score, leftmost first."""
    parts = list("\u2581" + text.replace(" ", "\u2581")) if text else []
    score_of = dict(zip(tokens, scores, strict=True))
    while True:
        candidates = [
            (-score_of[left + right], place)
            for place, (left, right) in enumerate(itertools.pairwise(parts))
            if left + right in score_of
        ]
        if not candidates:
            return parts
        place = min(candidates)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


@given(text=st.text(st.sampled_from("the modlqucker xnwof"), max_size=40))
@settings(deadline=None)
def test_sentencepiece_merges_by_score(round_trips: dict[str, tuple[Tokenizer, Tokenizer]], text: str) -> None:
    original, made = round_trips["sentencepiece"]
    pieces = json.loads(original.to_str())["model"]
    merged = list(dict.fromkeys("".join(pair) for pair in pieces["merges"]))
    scores = [-float(merged.index(t)) if t in merged else -1e9 for t in pieces["vocab"]]
    expected = merge_by_score(text, list(pieces["vocab"]), scores)
    assert made.encode(text, add_special_tokens=False).tokens == expected


def test_eos_is_added_where_the_keys_say_so(tmp_path: Path) -> None:
    values = tokenizer_values(write_tokenizer_folder(tmp_path, "sentencepiece"))
    bare = len(Tokenizer.from_str(values[HUGGINGFACE_JSON_KEY]).encode("a", add_special_tokens=False).ids)
    for add_bos, add_eos, expected in ((True, True, (1, 2)), (False, True, (2,)), (False, False, ())):
        values |= {"tokenizer.ggml.add_bos_token": add_bos, "tokenizer.ggml.add_eos_token": add_eos}
        ids = Tokenizer.from_str(tokenizer_json_from_gguf(values)).encode("a").ids
        assert len(ids) == bare + len(expected)
        assert tuple(token for token in ids if token in (1, 2)) == expected


def test_no_space_prefix_where_the_keys_say_so(tmp_path: Path) -> None:
    values = {
        **tokenizer_values(write_tokenizer_folder(tmp_path, "sentencepiece")),
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = Tokenizer.from_str(tokenizer_json_from_gguf(values))
    assert not tokenizer.encode("the", add_special_tokens=False).tokens[0].startswith("\u2581")
    assert tokenizer.decode(tokenizer.encode(" the").ids) == " the"


GPT2_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES = {**GPT2_BYTES, "use_regex": False}
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

MARKS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def hf_split(pattern: str, behavior: str, *, invert: bool) -> list[dict[str, Any]]:
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}, BYTES]


# tokenizer.ggml.pre -> the pre-tokenizer in the tokenizer.json of a family whose stock files have it, and the name that
# `convert` writes for that tokenizer.json.
HF_PRE_TOKENIZERS = {
    "refact": ([{"type": "Digits", "individual_digits": True}, GPT2_BYTES], "smollm"),  # Granite
    "olmo": ([GPT2_BYTES], "gpt-2"),  # OLMo
    "dbrx": (hf_split(CL100K, "Removed", invert=True), "smaug-bpe"),  # Phi-4, OLMo-2
    "gpt-4o": (hf_split(O200K, "Isolated", invert=False), "gpt-4o"),  # gpt-oss, Phi-4-mini
    "llama4": (hf_split(O200K, "Isolated", invert=False), "gpt-4o"),
    "qwen35": (hf_split(MARKS, "Isolated", invert=False), "qwen35"),  # Qwen3.5, which normalizes text too
}


@pytest.mark.parametrize("pre", HF_PRE_TOKENIZERS)
def test_pre_tokenizers_give_the_ids_of_the_familys_tokenizer_json(tmp_path: Path, pre: str) -> None:
    steps, name = HF_PRE_TOKENIZERS[pre]
    folder = write_tokenizer_folder(tmp_path, "gpt-2")
    normalizer = {"type": "NFC"} if pre == "qwen35" else None
    splitting = {"type": "Sequence", "pretokenizers": steps}
    edit_json(folder / "tokenizer.json", normalizer=normalizer, pre_tokenizer=splitting)
    values = tokenizer_values(folder)
    assert values["tokenizer.ggml.pre"] == name
    original = Tokenizer.from_str(values[HUGGINGFACE_JSON_KEY])
    made = Tokenizer.from_str(tokenizer_json_from_gguf({**values, "tokenizer.ggml.pre": pre}))
    for text in awkward_strings():
        assert made.encode(text).ids == original.encode(text).ids, text


def test_the_default_pre_tokenizer_splits_as_llama_cpp_does() -> None:
    """By hand: punctuation first, then as GPT-2, then runs of digits, then groups of three digits."""
    letters = [chr(code) for code in range(33, 127)] + ["\u0120"]
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*letters, "12", "\u0120a", "\u01201", "a.", "34"],
        "tokenizer.ggml.merges": ["1 2", "\u0120 a", "\u0120 1", "a .", "3 4"],
    }
    tokenizer = Tokenizer.from_str(tokenizer_json_from_gguf(values))
    assert tokenizer.encode("a. a 1 12345").tokens == [
        "a",
        ".",
        "\u0120a",
        "\u0120",
        "1",
        "\u0120",
        "12",
        "3",
        "4",
        "5",
    ]


@pytest.mark.parametrize(("pre", "expected"), [("llama-bpe", [3]), ("smaug-bpe", [0, 1, 2])])
def test_llama_3_takes_a_word_that_is_a_token_as_it_is(pre: str, expected: list[int]) -> None:
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": ["a", "b", "c", "abc"],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.add_bos_token": False,
    }
    assert Tokenizer.from_str(tokenizer_json_from_gguf(values)).encode("abc").ids == expected


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "smollm",
            {"tokenizer.ggml.pre": "deepseek-llm"},
            r"pre is deepseek-llm, but only a\.x-4\.0, .*, default, .*smollm",
        ),
        ("smollm", {"tokenizer.ggml.pre": None}, "convert the Hugging Face checkpoint instead"),
        ("smollm", {"tokenizer.ggml.model": "bert"}, "model is bert"),
        ("smollm", {"tokenizer.ggml.tokens": None}, r"tokens is missing"),
        ("smollm", {"tokenizer.ggml.tokens": [1, 2]}, r"tokens is missing or has the wrong type"),
        ("smollm", {"tokenizer.ggml.token_type": [1]}, "448 tokens but 1 token types"),
        ("smollm", {"tokenizer.ggml.merges": ["ab"]}, "'ab' is not a pair"),
        ("smollm", {"tokenizer.ggml.merges": ["qq qqqq"]}, "the tokenizer is not valid"),
        ("llama-bpe", {"tokenizer.ggml.bos_token_id": 10**9}, "bos_token_id is 1000000000"),
        ("sentencepiece", {"tokenizer.ggml.scores": [0.5]}, "448 tokens but 1 scores"),
        ("sentencepiece", {"tokenizer.ggml.unknown_token_id": -1}, "unknown_token_id is -1"),
    ],
)
def test_bad_keys_are_named(tmp_path: Path, kind: str, changes: dict[str, Any], message: str) -> None:
    values = {**tokenizer_values(write_tokenizer_folder(tmp_path, kind)), **changes}
    with pytest.raises(TritGgufError, match=message) as caught:
        tokenizer_json_from_gguf(values, where="model.gguf")
    assert str(caught.value).startswith("model.gguf: ")


# ---- the real SmolLM2 ----


def test_smollm2_splits_text_as_llama_cpp_does(smollm2_gguf: Path) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_json_from_gguf(GgufFile(smollm2_gguf).metadata))
    for text, ids in SMOLLM2_IDS.items():
        assert tokenizer.encode(text).ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
