"""`python -m tritgguf.lm_eval`: lm-eval's own command line, which knows the model `tritgguf` and the tasks here.

python -m tritgguf.lm_eval --model tritgguf --model_args pretrained=d3.gguf --tasks tritgguf_facts
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tritgguf.errors import TritGgufError
from tritgguf.lm_eval.registration import TASKS_FOLDER, register_model


def with_tasks(arguments: Sequence[str]) -> list[str]:
    """Return lm-eval's arguments with the folder of the tasks that ship here, unless they name a folder."""
    names = [argument.partition("=")[0] for argument in arguments]
    needs_tasks = "--tasks" in names or names[:1] in (["ls"], ["validate"])
    if "--include_path" in names or not needs_tasks:
        return list(arguments)
    return [*arguments, "--include_path", str(TASKS_FOLDER)]


def main() -> int:
    """Run lm-eval's command line; return the exit code."""
    try:
        register_model()
        from lm_eval.__main__ import cli_evaluate

        sys.argv = ["lm_eval", *with_tasks(sys.argv[1:])]
        cli_evaluate()
    except TritGgufError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
