"""Batch normalisation as training uses it: forward values, gradients through the statistics, running statistics.

Writes tests/golden/batch_norm.safetensors, with the naming of golden_ops.py; `CASE.running_mean` and `.running_var` are the
statistics before the pass, `CASE.after.running_mean` and `.after.running_var` those after it (momentum 0.1, unbiased variance).
Batches are chosen to fill no vector, one vector and a part of a second; one has a mean much larger than its deviation, one a
constant channel.
"""

import torch
import torch.nn.functional as F
from golden_common import save
from golden_ops import CASES, TENSORS, numbers_of, record


def batch_norm(batch, channels, size, kind="normal"):
    """kind: normal, offset (mean 30) or constant (the first channel has one value)."""
    case = f"batch_norm_of_batch_n{batch}_c{channels}_{size[0]}x{size[1]}_{kind}"
    numbers = numbers_of(case)
    before = {
        "running_mean": numbers.normal(channels),
        "running_var": (numbers.normal(channels) ** 2 + 0.1).float().double(),
    }
    x = numbers.normal(batch, channels, *size)
    if kind == "offset":
        x = (x + 30).float().double()
    elif kind == "constant":
        x[:, 0] = 2.5
    inputs = {"x": x, "weight": numbers.normal(channels), "bias": numbers.normal(channels)}
    after = {name: value.clone() for name, value in before.items()}

    def function(x, weight, bias):
        return F.batch_norm(x, after["running_mean"], after["running_var"], weight, bias, True, 0.1, 1e-5)

    record(case, {"op": "batch_norm", "eps": 1e-5}, inputs, function)
    for name, value in before.items():
        TENSORS[f"{case}.{name}"] = value
        TENSORS[f"{case}.after.{name}"] = after[name]


def main():
    """Writes everything."""
    for batch, channels, size in [
        (1, 2, (5, 5)),
        (2, 5, (3, 4)),
        (3, 16, (7, 7)),
        (8, 3, (1, 1)),
        (9, 3, (4, 4)),
        (17, 4, (2, 2)),
        (16, 8, (14, 14)),
    ]:
        batch_norm(batch, channels, size)
    batch_norm(9, 4, (7, 7), "offset")
    batch_norm(3, 3, (4, 4), "constant")
    save("batch_norm", TENSORS, CASES)
    print(f"  {len(CASES)} cases")


if __name__ == "__main__":
    main()
