"""Coverage-guided fuzzing of the GGUF header's reader with atheris (`pip install atheris`); takes libFuzzer's options.

python -m tools.fuzz.coverage -runs=1000000
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]

with atheris.instrument_imports(include=["tritgguf"]):
    from tools.fuzz.targets import Targets
    from tritgguf.errors import TritGgufError
    from tritgguf.formats.gguf_file import GgufFile
    from tritgguf.runtime.config import ModelConfig


def main() -> None:
    """Let atheris mutate files, starting from a valid one; any exception but TritGgufError is a finding."""
    with tempfile.TemporaryDirectory(prefix="tritgguf-fuzz-") as folder:
        path, corpus = Path(folder) / "damaged.gguf", Path(folder) / "corpus"
        corpus.mkdir()
        Targets(Path(folder) / "sound")
        shutil.copy(Path(folder) / "sound" / "short.gguf", corpus)

        def test(data: bytes) -> None:
            path.write_bytes(data)
            try:
                file = GgufFile(path)
                dict(file.metadata)
                ModelConfig.from_file(file)
            except TritGgufError:
                pass

        atheris.Setup([*sys.argv, str(corpus)], test)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
