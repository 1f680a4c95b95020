"""LangChain's own suite for chat models, through langchain-openai, against a server of SmolLM2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from serving import running_server

from tritgguf.generation.loaded_model import load

pytestmark = [pytest.mark.real_model, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def langchain_server(smollm2_d3: Path) -> Iterator[None]:
    with running_server(load(smollm2_d3, context=2048, parallel=2), alias="smollm2") as server:
        TestChatModel.url = f"{server.url}/v1"
        yield


@pytest.fixture
def benchmark() -> None:
    """Skip the suite's only timing: it takes recorded answers, and pyproject.toml turns its plugins off."""
    pytest.skip("a timing of recorded answers")


@pytest.fixture
def vcr() -> None:
    """The recorder that the timing asks for besides."""


class TestChatModel(ChatModelIntegrationTests):
    """Every test of the suite that is not about pictures, sound and PDF files."""

    url: ClassVar[str]

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        params = {"base_url": self.url, "api_key": "none", "model": "any", "max_retries": 0, "timeout": 300}
        # Without a penalty so small a model repeats itself for ever in a text that only JSON may end.
        options = {"temperature": 0, "frequency_penalty": 0.5, "max_tokens": 300, "stream_usage": True}
        # Where a tool is required, the model would call it again and again.
        return {**params, **options, "model_kwargs": {"parallel_tool_calls": False}}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "smollm2"  # there is one model, whatever a request names

    # What takes more wit than a model of 135 million parameters has. The form of the answers is right.

    @pytest.mark.xfail(reason="the model does not call a tool of its own accord")
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)

    @pytest.mark.xfail(reason="the model writes JSON, but not with the keys that the prompt asks for")
    def test_json_mode(self, model: BaseChatModel) -> None:
        super().test_json_mode(model)

    @pytest.mark.xfail(reason="the model does not come to the end of its joke within 300 tokens")
    def test_structured_output_optional_param(self, model: BaseChatModel) -> None:
        super().test_structured_output_optional_param(model)
