"""A fake source distribution of llama-cpp-python, without llama.cpp's sources."""

from __future__ import annotations

import io
import tarfile

from tools.llama_cpp import binaries


def distribution() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        root = f"llama_cpp_python-{binaries.VERSION}"
        for name in (f"{root}/setup.py", f"{root}/vendor/llama.cpp/CMakeLists.txt", f"{root}/vendor/other/x"):
            archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()
