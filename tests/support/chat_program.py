"""A program for tests: `run` with a scripted model, which answers each message after a pause per token.

Usage: python chat_program.py ANSWER SECONDS_PER_TOKEN [option of `run` ...]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]


def main(answer: str, seconds: float, options: list[str]) -> int:
    from scripted_model import END, scripted
    from small_tokenizers import encode

    from tritgguf.cli import app
    from tritgguf.generation import loaded_model

    model: Any = scripted([], context=1 << 16)
    tokens = [*encode(model.tokenizer, answer), END]
    forward = model.model.forward

    def slow_forward(*arguments: Any) -> None:
        time.sleep(seconds)
        model.model.script = model.model.script or list(tokens)
        forward(*arguments)

    model.model.forward = slow_forward
    setattr(loaded_model, "load", lambda *arguments, **settings: model)  # noqa: B010  # mypy would refuse it
    return app.main(["run", "model.gguf", *options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), sys.argv[3:]))
