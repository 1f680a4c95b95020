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


class TestChatModel(ChatModelIntegrationTests):
    """Every test of the suite that is not about pictures, sound and PDF files."""

    url: ClassVar[str]

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        params = {"base_url": self.url, "api_key": "none", "model": "any", "max_retries": 0, "timeout": 60}
        return {**params, "temperature": 0, "max_tokens": 200, "stream_usage": True}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "smollm2"  # there is one model, whatever a request names
