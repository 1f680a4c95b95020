"""Constants of the packed row; `docs/format.md` sections 1 to 3 specify them.

A row of K weights is K / 16 groups, in planes of little-endian 16-bit words. A word holds ten trits as the fixed-point
fraction ceil(code * 65536 / 3**10), most significant trit first. The planes, with their words per group:

    depth 1   A (2)
    depth 2   A (2), B (1), C (1/2)
    depth 3   A0, A1 (2 each), B (1), D (1/4)
    depth 4   A0, A1, A2 (2 each), C (1/2), D (1/4)
"""

from __future__ import annotations

GROUP_SIZE = 16
PAIRS = GROUP_SIZE // 2  # weights p and p + 8 of a group are in neighbouring 16-bit lanes
QUADS = GROUP_SIZE // 4  # weights p, p + 1, p + 8 and p + 9 of a group are in neighbouring 8-bit lanes
CODEBOOK_SIZE = 27
TABLE_SIZE = 32  # the step table is padded to two vectors of 16 floats
BLOCK_SIZE = 64
TILE_ROWS = 16  # rows unpacked at once
BLOCK_TOKENS = 6  # tokens that the prefill kernel multiplies at once
WORDS_PER_BLOCK = {1: 8, 2: 14, 3: 21, 4: 27}
TRIT_CODES = 3**10


def level_offset(depth: int) -> int:
    """Return h, the largest level: levels run from -h to h and are stored as level + h."""
    return (3**depth - 1) // 2
