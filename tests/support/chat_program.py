"""A program for tests: `run` with a scripted model, which gives each message the same answer.

While a file exists, the answer begins again where it ends, and each token takes a moment.

Usage: python chat_program.py ANSWER FILE [option of `run` ...]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]


_SECONDS_PER_TOKEN = 0.02  # of an endless answer


def main(answer: str, endless: Path, options: list[str]) -> int:
    from scripted_model import END, scripted
    from small_tokenizers import encode

    from tritgguf.cli import app
    from tritgguf.generation import loaded_model

    model: Any = scripted([], context=1 << 16)
    tokens = encode(model.tokenizer, f"{answer} ")
    forward = model.model.forward

    def answering_forward(*arguments: Any) -> None:
        if endless.exists():
            time.sleep(_SECONDS_PER_TOKEN)
            model.model.script = model.model.script or list(tokens)
        elif not model.model.script:
            model.model.script = [*encode(model.tokenizer, answer), END]
        forward(*arguments)

    model.model.forward = answering_forward
    setattr(loaded_model, "load", lambda *arguments, **settings: model)  # noqa: B010  # mypy would refuse it
    return app.main(["run", "model.gguf", *options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
