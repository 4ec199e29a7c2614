#!/usr/bin/env python3
"""Runs the Python example of docs/onnx.md, word for word, and with the noise of docs/noise.md.

    check_onnx_example.py DMD_RUN MODEL

The picture must be written both times, and the second must be that of `dmd-run --seed 42`, its levels within 1. Exit
status: 0 they agree, 1 a difference.
"""

import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib

import numpy as np

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"


def blocks(name):
    """The Python of a document."""
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL)


def read_png(path):
    """Levels `[height, width, channels]` of a PNG of 8 bits without filters."""
    data, at, parts = path.read_bytes(), 8, {}
    while at < len(data):
        (size,), kind = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        parts[kind] = data[at + 8 : at + 8 + size]
        assert zlib.crc32(kind + parts[kind]) == struct.unpack_from(">I", data, at + 8 + size)[0], f"checksum of {kind}"
        at += 12 + size
    width, height, depth, colour = struct.unpack_from(">IIBB", parts[b"IHDR"])
    assert depth == 8, f"{depth} bits"
    channels = {0: 1, 2: 3}[colour]
    lines = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, 1 + width * channels)
    assert not lines[:, 0].any(), "a line has a filter"
    return lines[:, 1:].reshape(height, width, channels).astype(int)


def main():
    """Runs, compares."""
    program, model = (pathlib.Path(argument).resolve() for argument in sys.argv[1:])
    example, contract = blocks("onnx.md")
    own_noise = re.search(r"^z = .*\n", example, re.MULTILINE)
    assert own_noise, "the example makes no noise `z`"
    shared = example.replace(own_noise[0], "\n".join(blocks("noise.md")) + contract)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        shutil.copy(model, "model.onnx")
        pictures, picture = [], pathlib.Path("images.png")
        for code in (example, shared):
            picture.unlink(missing_ok=True)
            subprocess.run([sys.executable, "-c", code], check=True)
            pictures.append(read_png(picture))
        command = [program, "model.onnx", "--seed", "42", "--count", "10", "-o", "x.npy"]
        subprocess.run(command, check=True, capture_output=True)
        images = np.load("x.npy")
    expected = np.floor(np.clip((images + 1) / 2, 0, 1) * 255 + 0.5).astype(int)
    expected = np.concatenate(expected.transpose(0, 2, 3, 1), axis=1)
    if any(p.shape != expected.shape for p in pictures) or np.ptp(pictures[0]) < 128:
        sys.exit(f"docs/onnx.md: got pictures of {[p.shape for p in pictures]}, expected {expected.shape}")
    worst = np.abs(pictures[1] - expected).max()
    print(f"docs/onnx.md: the example's picture and that of dmd-run differ by {worst} levels")
    sys.exit(int(worst > 1))


if __name__ == "__main__":
    main()
