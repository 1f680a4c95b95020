"""A third text, which no constant was chosen by: exam questions of 57 subjects with reasoned answers.

    python -m tools.quality.exam_text > exam.txt

lm-eval brings them in one file, under the MIT license: the examples of MMLU (Hendrycks et al., 2021) with answers in
sentences (Chung et al., 2022). They are neither code nor documentation, unlike `package_texts`, and were fixed before
anything was measured on them. It stays a judge only as long as constants are chosen on the other two texts.
"""

from __future__ import annotations

import hashlib
import json
import re
from importlib.util import find_spec
from pathlib import Path

from tritgguf.errors import TritGgufError

_FILE = "tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
_SHA256 = "081478485b1d4f51e01305e19113f0e3a468f2dc787596386998e229a97b096c"
# Openings of the answers, the same words hundreds of times; the dots stand for apostrophes.
_OPENINGS = re.compile(
    r" *(Let.s think step by step|We refer to Wikipedia articles on [a-z ]+ for help|"
    r"Let.s solve this( problem)? step by step)\."
)


def text() -> str:
    """Return the text, subject by subject; TritGgufError if lm-eval is missing or brings another version of it."""
    package = find_spec("lm_eval")
    if package is None or package.origin is None:
        raise TritGgufError("the exam questions come with lm-eval: pip install lm-eval==0.4.13")
    path = Path(package.origin).parent / _FILE
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != _SHA256:
        raise TritGgufError(f"{path}: is not the text that docs/quality.md has figures of; install lm-eval 0.4.13")
    subjects = json.loads(path.read_text("utf-8"))
    return "\n\n".join(_OPENINGS.sub("", subjects[name].strip()) for name in sorted(subjects))


if __name__ == "__main__":
    print(text())
