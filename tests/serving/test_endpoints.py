"""Embeddings, tokens, and what the server says of itself."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from serving import RunningServer

from tritgguf.generation.loaded_model import LoadedModel


def test_embeddings_are_the_librarys(server: RunningServer, serving_model: LoadedModel) -> None:
    texts = ["A sentence.", "Another one, which is longer."]
    answer = server.openai.embeddings.create(model="tiny", input=texts)  # the client asks for base64
    plain = server.post("/v1/embeddings", input=texts, encoding_format="float").json()
    for text, entry, other in zip(texts, answer.data, plain["data"], strict=True):
        np.testing.assert_array_equal(np.array(entry.embedding, np.float32), serving_model.embed(text))
        np.testing.assert_array_equal(np.array(other["embedding"], np.float32), serving_model.embed(text))
    assert plain["usage"]["prompt_tokens"] == answer.usage.prompt_tokens > 0
    tokens = server.post("/tokenize", prompt=texts[0]).json()["tokens"]
    by_tokens = server.openai.embeddings.create(model="tiny", input=tokens, dimensions=128)
    assert by_tokens.data[0].embedding == answer.data[0].embedding
    for parameter, value in (("dimensions", 64), ("input", []), ("input", ""), ("encoding_format", "hex")):
        assert server.error("/v1/embeddings", **{"input": "a", parameter: value})["param"] == parameter
    assert server.error("/v1/embeddings", input="word " * 700)["code"] == "context_length_exceeded"


def test_tokenize_and_detokenize(server: RunningServer, serving_model: LoadedModel) -> None:
    text = "The quick \U0001f422<|im_end|>"
    tokens = server.post("/tokenize", content=text).json()["tokens"]
    assert tokens == serving_model.tokenizer.encode(text, add_special=False, parse_special=True)
    assert server.post("/detokenize", tokens=tokens).json()["content"] == "The quick \U0001f422"
    plain = server.post("/tokenize", content=text, parse_special=False).json()["tokens"]
    assert server.post("/detokenize", tokens=plain).json()["content"] == text
    pieces = server.post("/tokenize", content=text, with_pieces=True).json()["tokens"]
    assert [piece["id"] for piece in pieces] == tokens
    raw = b"".join(bytes(p["piece"]) if isinstance(p["piece"], list) else p["piece"].encode() for p in pieces)
    assert raw.decode() == text
    chat = server.post("/tokenize", messages=[{"role": "user", "content": "Hi"}]).json()
    assert chat["count"] == len(chat["tokens"]) > 5
    for body in ({}, {"content": "a", "prompt": "b"}):
        assert "content, prompt or messages" in server.error("/tokenize", **body)["message"]
    assert server.error("/detokenize", tokens=[448])["param"] == "tokens"
    assert server.post("/detokenize", tokens=[]).json()["content"] == ""


def test_lm_eval_uses_the_servers_tokenizer(server: RunningServer) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    url = f"{server.url}/v1/completions"
    assert utils.check_remote_tokenizer_support(url)
    tokenizer = utils.RemoteTokenizer(url)
    assert tokenizer.decode(tokenizer.encode("The quick")) == "The quick"
    assert isinstance(tokenizer.eos_token_id, int)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert (
        tokenizer.encode(rendered)
        == server.post("/tokenize", messages=[{"role": "user", "content": "Hi"}]).json()["tokens"]
    )


def test_what_the_server_says_of_itself(server: RunningServer, serving_model: LoadedModel) -> None:
    (model,) = server.openai.models.list().data
    assert model.id == "tiny"
    assert server.openai.models.retrieve("tiny").id == "tiny"
    assert server.http.get("/v1/models/other").status_code == 404
    assert server.http.get("/health").json() == {"status": "ok"}
    props = server.http.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] == 640
    assert props["total_slots"] == len(server.http.get("/slots").json()) == 4
    paths = " ".join(server.http.get(path).text for path in ("/props", "/v1/models", "/slots", "/tokenizer_info"))
    assert str(serving_model.path.parent) not in paths


def test_metrics_count_what_runs(server: RunningServer) -> None:
    def counters() -> dict[str, float]:
        lines = server.http.get("/metrics").text.splitlines()
        pairs: Any = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name: float(value) for name, value in pairs}

    before = counters()
    usage = server.post("/v1/completions", prompt="Seven tokens of a prompt", max_tokens=5).json()["usage"]
    after = counters()
    assert (
        after["llamacpp:tokens_predicted_total"] - before["llamacpp:tokens_predicted_total"]
        == usage["completion_tokens"]
    )
    evaluated = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    assert after["llamacpp:prompt_tokens_total"] - before["llamacpp:prompt_tokens_total"] == evaluated
    assert after["llamacpp:n_decode_total"] > before["llamacpp:n_decode_total"]
    assert after["llamacpp:requests_processing"] == after["llamacpp:requests_deferred"] == 0
    assert all(re.fullmatch("llamacpp:[a-z_]+", name) for name in after)


def test_the_reference_lists_every_endpoint_without_scripts(server: RunningServer) -> None:
    page, schema = server.http.get("/docs"), server.http.get("/openapi.json").json()
    assert page.headers["content-type"].startswith("text/html")
    assert all(f"{path}</code>" in page.text for path in schema["paths"])
    assert "<code>temperature</code>" in page.text
    assert "<script" not in page.text
    assert set(schema["paths"]) >= {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize"}


def test_what_does_not_exist(server: RunningServer) -> None:
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("PUT", "/health", 405)):
        response = server.http.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"
