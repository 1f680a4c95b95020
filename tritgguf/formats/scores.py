"""What was measured of a file's model, as the file's metadata has it: how far it is from the source, and on which text.

`docs/format.md` lists the keys. They are for information only, and a reader that finds them damaged ignores them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFValue

KEY_PREFIX = "trit.score."


@dataclass(frozen=True)
class Score:
    """The measures of a file on a text; divergences in nats, against the source.

    Attributes:
        kl_mean, kl_p99: mean and 99th percentile of the KL divergence.
        top1_agreement: fraction of positions with the same most likely token.
        perplexity, perplexity_reference: of the file and of its source.
        tokens: number of tokens that were evaluated, from the text's start.
        text: the text's fingerprint, see `text_fingerprint`.
        source: the source's name, or empty.
        revision: the source's commit on the hub, or empty.

    """

    kl_mean: float
    kl_p99: float
    top1_agreement: float
    perplexity: float
    perplexity_reference: float
    tokens: int
    text: str
    source: str = ""
    revision: str = ""

    def metadata(self) -> dict[str, GGUFValue]:
        """Return the keys and values of a file; texts that are empty are left out."""
        from gguf import GGUFValue, GGUFValueType

        types = {float: GGUFValueType.FLOAT64, int: GGUFValueType.UINT32, str: GGUFValueType.STRING}
        return {
            KEY_PREFIX + name: GGUFValue(value, types[type(value)]) for name, value in vars(self).items() if value != ""
        }


def read_score(metadata: Mapping[str, Any]) -> Score | None:
    """Return the score in a file's metadata; None if there is none or if a value of it is impossible."""
    values: dict[str, Any] = {}
    for field in fields(Score):
        value = metadata.get(KEY_PREFIX + field.name, None if field.default is MISSING else field.default)
        if type(value).__name__ != field.type or (isinstance(value, float) and not 0 <= value < math.inf):
            return None
        values[field.name] = value
    score = Score(**values)
    return score if score.top1_agreement <= 1 and score.tokens > 0 else None


def text_fingerprint(text: str) -> str:
    """Return the fingerprint of an evaluation text: SHA-256 of its UTF-8, in hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
