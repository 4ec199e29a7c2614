"""Reference implementation of the noise contract dmd-noise-1 in plain Python, independent of core's.

Writes tests/golden/noise.safetensors and the test vectors between the markers of docs/noise.md. The function between
the marker comments below is printed in docs/noise.md; tests/core.rs checks that both are the same text.
"""

import torch
from golden_common import ROOT, save


# reference begin
import math
import struct


def chacha_block(key, counter, stream, rounds=8):
    """16 words of ChaCha: 32 key bytes, a 64-bit block counter, a 64-bit stream."""
    start = list(struct.unpack("<4I", b"expand 32-byte k") + struct.unpack("<8I", key))
    start += struct.unpack("<4I", struct.pack("<QQ", counter, stream))
    x = list(start)

    def quarter(a, b, c, d):
        for p, q, r, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[p] = (x[p] + x[q]) % 2**32
            mixed = x[r] ^ x[p]
            x[r] = (mixed << bits | mixed >> (32 - bits)) % 2**32

    for _ in range(rounds // 2):
        for i in range(4):
            quarter(i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return [(a + b) % 2**32 for a, b in zip(x, start)]


def standard_normal(seed, image, count):
    """The first `count` values of image `image` of seed `seed`, still in f64."""
    key = struct.pack("<Q", seed) + bytes(24)
    words = [w for block in range(-(-count // 16)) for w in chacha_block(key, block, image)]
    values = []
    for a, b in zip(words[0::2], words[1::2]):
        radius = math.sqrt(-2 * math.log((a + 1) / 2**32))
        angle = 2 * math.pi * (b / 2**32)
        values += [radius * math.cos(angle), radius * math.sin(angle)]
    return values[:count]
# reference end


CASES = [
    (0, 0, 16),
    (1, 0, 5),
    (42, 0, 784),
    (42, 1, 784),
    (42, 7, 33),
    (2023, 123456, 17),
    (4294967295, 3, 64),
    (7, 4294967301, 64),
    (0, 18446744073709551615, 8),
    (5, 2, 1),
]


def check_published_keystreams():
    """Zero key: 20 rounds as in RFC 8439 A.1 (1), 8 rounds as in draft-strombergson-chacha-test-vectors TC1."""
    for rounds, expected in ((20, "76b8e0ada0f13d90405d6ae55386bd28"), (8, "3e00ef2f895f40d67f5bb8e81f09a5a1")):
        got = struct.pack("<16I", *chacha_block(bytes(32), 0, 0, rounds)).hex()
        assert got.startswith(expected), (rounds, got)


def vectors():
    """The rows of the table in docs/noise.md: first values as decimal and as f32 bits."""
    rows = ["| seed | image | first values (f32) | their bits |", "|---|---|---|---|"]
    for seed, image, count in CASES:
        single = [struct.unpack("<f", struct.pack("<f", v))[0] for v in standard_normal(seed, image, min(count, 4))]
        decimals = " ".join(f"{v:.9g}" for v in single)
        bits = " ".join(f"{struct.unpack('<I', struct.pack('<f', v))[0]:08x}" for v in single)
        rows.append(f"| {seed} | {image} | {decimals} | {bits} |")
    return "\n".join(rows)


def main():
    """Writes everything."""
    check_published_keystreams()
    tensors, cases = {}, {}
    for seed, image, count in CASES:
        name = f"seed{seed}_image{image}"
        tensors[name] = torch.tensor(standard_normal(seed, image, count), dtype=torch.float64)
        cases[name] = {"seed": seed, "image": image}
    save("noise", tensors, cases)

    page = ROOT / "docs" / "noise.md"
    head, rest = page.read_text().split("<!-- vectors begin -->")
    tail = rest.split("<!-- vectors end -->")[1]
    page.write_text(f"{head}<!-- vectors begin -->\n{vectors()}\n<!-- vectors end -->{tail}")


if __name__ == "__main__":
    main()
