"""Count the numbers that differ between the weights of two Hugging Face folders.

    python -m tools.recovery.differing_numbers FOLDER OTHER

It reads safetensors and compares with NumPy, without code of tritgguf. FP16 and FP32 only.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import safe_open


def tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a folder in the order of their names."""
    places = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), "np") as file:
            places.update(dict.fromkeys(file.keys(), path))
    for name, path in sorted(places.items()):
        with safe_open(str(path), "np") as file:
            yield name, file.get_tensor(name)


def main() -> None:
    """Parse the command line, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs=2, metavar="FOLDER")
    first, second = parser.parse_args().folders
    numbers = differing = differing_bits = count = 0
    for (name, tensor), (other_name, other) in zip(tensors(first), tensors(second), strict=True):
        if (name, tensor.dtype, tensor.shape) != (other_name, other.dtype, other.shape):
            parser.error(f"{name} is {tensor.dtype} {tensor.shape}, {other_name} is {other.dtype} {other.shape}")
        differing += int(np.count_nonzero(tensor != other))
        bits = f"u{tensor.itemsize}"
        differing_bits += int(np.count_nonzero(tensor.view(bits) != other.view(bits)))
        numbers, count = numbers + tensor.size, count + 1
    print(f"{count} tensors, {numbers} numbers, {differing} differ, {differing_bits} in any bit")


if __name__ == "__main__":
    main()
