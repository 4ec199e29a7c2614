"""CIFAR-10 in its Python version, in tiny, as today's Python and numpy pickle it: one image per batch, two in the test batch.

Writes tests/fixtures/cifar-10-batches-py. Value k of image i is (37·i + 11·k + k // 32) mod 256 and its label (3·i) mod 10;
images 0 to 4 are the training batches, 5 and 6 the test batch. Protocol 2 throughout, keys as bytes or as text, and
protocol 4 for the test batch. `code/data_batch_1` would run a command if anybody executed it. Needs numpy alone.
"""

import os
import pickle
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "cifar-10-batches-py"


def image(i):
    """The bytes of one image, channel by channel."""
    k = np.arange(3072)
    return ((37 * i + 11 * k + k // 32) % 256).astype(np.uint8)


def write(path, images, protocol, key):
    """One batch."""
    batch = {
        key("batch_label"): key("a tiny batch"),
        key("labels"): [3 * i % 10 for i in images],
        key("data"): np.stack([image(i) for i in images]),
        key("filenames"): [key(f"image_{i}.png") for i in images],
    }
    path.write_bytes(pickle.dumps(batch, protocol=protocol))
    print(f"{path.name}: {path.stat().st_size} bytes")


class Code:
    """What a hostile pickle looks like."""

    def __reduce__(self):
        return os.system, ("touch executed-by-a-pickle",)


def main():
    """Writes all batches."""
    (FOLDER / "code").mkdir(parents=True, exist_ok=True)
    for i in range(5):
        write(FOLDER / f"data_batch_{i + 1}", [i], 2, str if i == 4 else str.encode)
    write(FOLDER / "test_batch", [5, 6], 4, str)
    (FOLDER / "code" / "data_batch_1").write_bytes(pickle.dumps({"data": Code(), "labels": []}, protocol=2))


if __name__ == "__main__":
    main()
