"""Conversion of tokenizers from Hugging Face folders to GGUF keys and back."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType, TokenType
from source_checks import tokenizer_values
from tiny_models import (
    CHAT_TEMPLATE,
    PADDED_VOCABULARY,
    edit_json,
    tiny_tokenizer_json,
    write_tokenizer_folder,
)
from tokenizers import Tokenizer

from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.tokenization.hf_to_gguf import HUGGINGFACE_JSON_KEY, tokenizer_metadata

BYTE_LEVEL_KINDS = ("smollm", "gpt-2", "qwen2", "llama-bpe")


# ---- Hugging Face -> GGUF ----


@pytest.mark.parametrize("kind", BYTE_LEVEL_KINDS)
def test_logging_is_left_alone(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger("gguf").handlers[:]
    tokenizer_values(write_tokenizer_folder(tmp_path, kind))
    assert logging.getLogger("gguf").handlers == before
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", BYTE_LEVEL_KINDS)
def test_keys_of_byte_level_bpe(tmp_path: Path, kind: str) -> None:
    values = tokenizer_values(write_tokenizer_folder(tmp_path, kind))
    begins = ["tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_sep_token"] if kind == "llama-bpe" else []
    assert list(values) == [
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.padding_token_id",
        *begins,
        "tokenizer.chat_template",
        HUGGINGFACE_JSON_KEY,
    ]
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"]) == ("gpt2", kind)
    assert (values["tokenizer.ggml.bos_token_id"], values["tokenizer.ggml.eos_token_id"]) == (0, 2)
    assert values["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert values[HUGGINGFACE_JSON_KEY] == tiny_tokenizer_json(kind)
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == PADDED_VOCABULARY
    assert types[:4] == [TokenType.CONTROL] * 3 + [TokenType.NORMAL]
    assert (tokens[400], types[400]) == ("<tool_call>", TokenType.USER_DEFINED)
    assert (tokens[447], types[447]) == ("[PAD447]", TokenType.UNUSED)
    left, right = values["tokenizer.ggml.merges"][0].split(" ")
    assert left + right in tokens


def test_keys_of_sentencepiece(tmp_path: Path) -> None:
    values = tokenizer_values(write_tokenizer_folder(tmp_path, "sentencepiece", add_prefix_space=True))
    assert list(values)[:6] == [
        "tokenizer.ggml.add_space_prefix",
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.scores",
        "tokenizer.ggml.token_type",
    ]
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"]) == ("llama", "default")
    assert values["tokenizer.ggml.add_bos_token"] is True
    assert values["tokenizer.ggml.unknown_token_id"] == 0
    types, scores = values["tokenizer.ggml.token_type"], values["tokenizer.ggml.scores"]
    assert types[:3] == [TokenType.CONTROL] * 3
    assert types[3:259] == [TokenType.BYTE] * 256
    # Merged tokens follow the bytes in the order of their merges, as in every SentencePiece vocabulary.
    assert scores[259:264] == [0.0, -1.0, -2.0, -3.0, -4.0]
    assert (types[-1], scores[-1]) == (TokenType.UNUSED, -10000.0)


def test_types_are_those_that_gguf_demands(tmp_path: Path) -> None:
    metadata, _ = tokenizer_metadata(
        write_tokenizer_folder(tmp_path, "sentencepiece"), PADDED_VOCABULARY, add_space_prefix_key=True
    )
    assert metadata["tokenizer.ggml.bos_token_id"].type == GGUFValueType.UINT32
    assert metadata["tokenizer.ggml.add_bos_token"].type == GGUFValueType.BOOL
    assert metadata["tokenizer.ggml.scores"].type == GGUFValueType.ARRAY
    assert all(isinstance(score, float) for score in metadata["tokenizer.ggml.scores"].value)
    assert metadata[HUGGINGFACE_JSON_KEY].type == GGUFValueType.STRING


def test_qwen2_has_no_key_for_the_space_prefix(tmp_path: Path) -> None:
    folder = write_tokenizer_folder(tmp_path, "qwen2", add_prefix_space=False)
    with_key, _ = tokenizer_metadata(folder, PADDED_VOCABULARY, add_space_prefix_key=True)
    without, _ = tokenizer_metadata(folder, PADDED_VOCABULARY, add_space_prefix_key=False)
    assert set(with_key) - set(without) == {"tokenizer.ggml.add_space_prefix"}


def test_smollms_vocabulary_begins_without_bos(tmp_path: Path) -> None:
    assert "tokenizer.ggml.add_bos_token" not in tokenizer_values(write_tokenizer_folder(tmp_path, "smollm"))
    assert tokenizer_values(tmp_path, 49152)["tokenizer.ggml.add_bos_token"] is False


def test_an_unknown_pre_tokenizer_is_written_as_default_with_a_warning(tmp_path: Path) -> None:
    write_tokenizer_folder(tmp_path, "qwen2")
    tokenizer = json.loads(tiny_tokenizer_json("qwen2"))
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,2}|\s+"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    metadata, warnings = tokenizer_metadata(tmp_path, PADDED_VOCABULARY, add_space_prefix_key=True)
    assert metadata["tokenizer.ggml.pre"].value == "default"
    assert len(warnings) == 1
    assert "tokenizer.json" in warnings[0]


def test_llama_3s_expression_without_ignore_merges_has_another_name(tmp_path: Path) -> None:
    write_tokenizer_folder(tmp_path, "llama-bpe")
    tokenizer = json.loads(tiny_tokenizer_json("llama-bpe"))
    tokenizer["model"]["ignore_merges"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert tokenizer_values(tmp_path)["tokenizer.ggml.pre"] == "smaug-bpe"


def test_added_tokens_that_look_special_are_control_tokens(tmp_path: Path) -> None:
    write_tokenizer_folder(tmp_path, "smollm")
    tokenizer = Tokenizer.from_str(tiny_tokenizer_json("smollm"))
    tokenizer.add_tokens(["<|fim_prefix|>", "\u2581\u2581word"])
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    values = tokenizer_values(tmp_path)
    added = list(zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"], strict=True))[401:403]
    assert added == [("<|fim_prefix|>", TokenType.CONTROL), ("  word", TokenType.USER_DEFINED)]


def test_a_chat_template_in_a_file_of_its_own(tmp_path: Path) -> None:
    write_tokenizer_folder(tmp_path, "smollm", chat_template=None)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert "tokenizer.chat_template" not in tokenizer_values(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_values(tmp_path)["tokenizer.chat_template"] == "{{ messages }}"


def test_named_chat_templates(tmp_path: Path) -> None:
    named = [{"name": n, "template": f"{{{{ {n} }}}}"} for n in ("tool_use", "default", "rag")]
    values = tokenizer_values(write_tokenizer_folder(tmp_path, "smollm", chat_template=named))
    assert values["tokenizer.chat_template"] == "{{ default }}"
    assert values["tokenizer.chat_templates"] == ["rag", "tool_use"]
    assert values["tokenizer.chat_template.rag"] == "{{ rag }}"


# ---- damaged folders ----


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(TritGgufError, match=r"has no tokenizer\.json and no tokenizer\.model"):
        tokenizer_values(tmp_path)


def test_more_tokens_than_rows_of_the_embedding(tmp_path: Path) -> None:
    for kind in ("smollm", "sentencepiece"):
        with pytest.raises(TritGgufError, match="vocab_size of 390"):
            tokenizer_values(write_tokenizer_folder(tmp_path, kind), 390)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "type None is not supported"),
        ({"model": {"type": "Unigram", "vocab": []}}, "type Unigram is not supported"),
        (
            {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": None},
            "neither on bytes",
        ),
        ({"model": {"type": "BPE", "vocab": {"a": "0"}}}, "token id '0' does not fit"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}}}, "token id -1 does not fit"),
        ({"model": {"type": "BPE", "vocab": {}, "byte_fallback": True}}, "no list of merges"),
        ({"model": {"type": "BPE", "vocab": {}, "byte_fallback": True, "merges": [1]}}, "not a pair of tokens"),
        ({"added_tokens": 3}, "added_tokens is not a list"),
        ({"added_tokens": [{"id": "0", "content": "a"}]}, "has no id or no content"),
        ({"added_tokens": [{"id": 10**9, "content": "a"}]}, "token id 1000000000 does not fit"),
        ({"decoder": {"type": "Nonsense"}}, "the tokenizer is not valid"),
        ({"post_processor": {"processors": 3}}, "JSON files are damaged"),
    ],
)
def test_a_damaged_tokenizer_json_gives_a_clear_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_tokenizer_folder(tmp_path, "smollm")
    edit_json(tmp_path / "tokenizer.json", **changes)
    with pytest.raises(TritGgufError, match=message) as caught:
        tokenizer_values(tmp_path)
    assert "\n" not in str(caught.value)


def test_text_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    folder = write_tokenizer_folder(tmp_path, "smollm", chat_template="half a pair: \ud83d")
    with pytest.raises(TritGgufError, match=r"tokenizer\.chat_template would contain half of a surrogate"):
        tokenizer_values(folder)


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        3,
        [],
        {"type": "Sequence", "pretokenizers": 3},
        {"type": "Sequence", "pretokenizers": [3, {"type": "Split", "pattern": 3}]},
    ],
)
def test_a_senseless_pre_tokenizer_gives_a_clear_error(tmp_path: Path, pre_tokenizer: Any) -> None:
    write_tokenizer_folder(tmp_path, "smollm")
    edit_json(tmp_path / "tokenizer.json", pre_tokenizer=pre_tokenizer)
    with pytest.raises(TritGgufError):
        tokenizer_values(tmp_path)


# ---- the real SmolLM2 ----


def test_the_smollm2_folder_has_the_tokenizer_of_the_file(smollm2_gguf: Path, smollm2_folder: Path) -> None:
    stock = GgufFile(smollm2_gguf).metadata
    ours = tokenizer_values(smollm2_folder, 49152)
    for key in (
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.unknown_token_id",
        "tokenizer.ggml.padding_token_id",
        "tokenizer.ggml.add_bos_token",
        "tokenizer.chat_template",
    ):
        assert ours[key] == stock[key], key
