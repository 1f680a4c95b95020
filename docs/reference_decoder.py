"""A decoder for the trit tensor types, written from format.md alone. Run it to check it against section 6."""

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WORDS_PER_BLOCK = {1: 8, 2: 14, 3: 21, 4: 27}  # 16-bit words per 64 weights, section 1


def digits(words: NDArray[np.uint16], *radices: int) -> list[NDArray[np.uint32]]:
    """The digits of each word, most significant first (section 3, "Words")."""
    v, result = words.astype(np.uint32), []
    for r in radices:
        v = v * np.uint32(r)
        result.append(v >> np.uint32(16))
        v = v & np.uint32(0xFFFF)
    return result


def decode(
    data: bytes | NDArray[np.uint8], columns: int, depth: int, codebook: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The weights [rows, columns] of a tensor's data; in the names of sections 2 to 4, `[r, g]` left out.

    `codebook` has 27 scales, or 27 for each matrix of a stack, whose rows are then those of all its matrices.
    """
    if columns <= 0 or columns % 64:
        raise ValueError("columns must be a positive multiple of 64")
    row = np.frombuffer(data, "<u2").reshape(-1, columns // 64 * WORDS_PER_BLOCK[depth])
    rows, G, h, M = len(row), columns // 16, (3**depth - 1) // 2, len(codebook) // 27
    if len(codebook) != 27 * M or M == 0 or rows % M:
        raise ValueError("there must be 27 scales for every matrix, and as many rows in each")
    u = np.empty((16, rows, G), np.uint8)  # u[p] is u[g][p] of all rows and groups g
    i = np.empty((rows, G), np.uint8)
    if depth == 1:
        *u[0:8], i_high = digits(row[:, 0::2], *[3] * 8, 9)
        *u[8:16], i_low = digits(row[:, 1::2], *[3] * 8, 3)
        i[:] = i_high * 3 + i_low
    elif depth == 2:
        A, B, C = np.split(row, [2 * G, 3 * G], axis=1)
        u[0], u[1], u[2], u[3], u[4] = digits(A[:, 0::2], 9, 9, 9, 9, 9)
        u[8], u[9], u[10], u[11], u[12] = digits(A[:, 1::2], 9, 9, 9, 9, 9)
        u[5], u[13], u[6], u[14], u[7] = digits(B, 9, 9, 9, 9, 9)
        u[15, :, 0::2], u[15, :, 1::2], i[:, 0::2], i[:, 1::2] = digits(C, 9, 9, 27, 27)
    elif depth == 3:
        A0, A1, B, D = np.split(row, [2 * G, 4 * G, 5 * G], axis=1)
        u[0], u[1], u[2], z_high = digits(A0[:, 0::2], 27, 27, 27, 3)
        u[8], u[9], u[10], z_middle = digits(A0[:, 1::2], 27, 27, 27, 3)
        u[3], u[4], u[5], z_low = digits(A1[:, 0::2], 27, 27, 27, 3)
        u[11], u[12], u[13], i_high = digits(A1[:, 1::2], 27, 27, 27, 3)
        u[6], u[14], u[7], i_middle = digits(B, 27, 27, 27, 3)
        i_low = np.stack(digits(D, 3, 3, 3, 3), axis=2).reshape(rows, G)  # D[t]: groups 4t to 4t + 3
        u[15] = z_high * 9 + z_middle * 3 + z_low
        i[:] = i_high * 9 + i_middle * 3 + i_low
    else:
        A0, A1, A2, C, D = np.split(row, [2 * G, 4 * G, 6 * G, 6 * G + G // 2], axis=1)
        for A, p, split in (A0, 0, 6), (A1, 2, 14), (A2, 4, 7):
            u[p], u[p + 1], high = digits(A[:, 0::2], 81, 81, 9)
            u[p + 8], u[p + 9], low = digits(A[:, 1::2], 81, 81, 9)
            u[split] = high * 9 + low
        u[15, :, 0::2], u[15, :, 1::2], *i_even_odd = digits(C, 81, 81, 3, 3)
        i_high = np.stack(i_even_odd, axis=2).reshape(rows, G)  # C[q]: groups 2q and 2q + 1
        i_low = np.stack(digits(D, 9, 9, 9, 9), axis=2).reshape(rows, G)
        i[:] = i_high * 9 + i_low
    step = np.asarray(codebook, np.float32).reshape(M, 27) / np.float32(h)
    matrix = np.arange(M).repeat(rows // M)[:, np.newaxis]  # of each row
    levels = u.transpose(1, 2, 0).astype(np.float32) - np.float32(h)  # [rows, G, 16]
    return (step[matrix, i][:, :, np.newaxis] * levels).reshape(rows, columns)


if __name__ == "__main__":
    text = Path(__file__).with_name("format.md").read_text(encoding="utf-8").split("## 6. Worked examples")[1]
    column, scales = np.arange(64), np.arange(1, 28, dtype=np.float32) / np.float32(64)
    for d, dump in re.findall(r"`TRIT(\d)`, \d+ bytes:\n\n((?: {4}.*\n)+)", text):
        weights = decode(bytes.fromhex(dump), 64, int(d), scales)[0]
        h_d = np.float32((3 ** int(d) - 1) // 2)
        level = ((7 * column + 3) % 3 ** int(d)).astype(np.float32) - h_d
        assert np.array_equal(weights, scales[(5 * (column // 16) + 2) % 27] / h_d * level), f"TRIT{d}"
        first, last = (f"{bits:#010x}" for bits in weights[[0, -1]].view(np.uint32))
        assert re.search(rf"`TRIT{d}`\s{first}, {last}", text), f"TRIT{d}: {first}, {last}"
        print(f"TRIT{d}: as stated in section 6")
