"""Forward values and gradients of the single operations of dmd_core::net::Ops.

Writes tests/golden/ops.safetensors. For every case CASE: inputs `CASE.x` (and `.b`, `.q`, `.k`, `.v`, `.weight`,
`.bias`), result `CASE.y`, `CASE.cotangent`, and `CASE.grad.INPUT`, the gradient of sum(y·cotangent) with respect to
each input. The header's `cases` maps CASE to its operation and parameters. Sizes are chosen where kernels
break: channel counts that fill no vector, images smaller than the kernel, odd sizes under a stride, constant and zero
input. The cases of `timestep_embedding` have `CASE.t` and `CASE.y` alone, from diffusers' own f32 function.
"""

import zlib

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from golden_common import Numbers, save

CASES = {}
TENSORS = {}


def record(case, description, inputs, function):
    """Runs one case and keeps everything about it."""
    leaves = {key: value.clone().requires_grad_() for key, value in inputs.items()}
    y = function(*leaves.values())
    cotangent = Numbers(zlib.crc32(case.encode()) + 1).normal(*y.shape)
    (y * cotangent).sum().backward()
    CASES[case] = description
    for key, leaf in leaves.items():
        TENSORS[f"{case}.{key}"] = leaf
        TENSORS[f"{case}.grad.{key}"] = leaf.grad
    TENSORS[f"{case}.y"] = y
    TENSORS[f"{case}.cotangent"] = cotangent


def numbers_of(case):
    """Each case has its own seed, so that adding one changes no other."""
    return Numbers(zlib.crc32(case.encode()))


def conv2d(batch, channels, size, kernel, stride, padding):
    """padding is [top, left, bottom, right]."""
    (c_in, c_out), (h, w) = channels, size
    case = f"conv2d_{c_in}to{c_out}_{h}x{w}_n{batch}_k{kernel}s{stride}p{''.join(map(str, padding))}"
    numbers = numbers_of(case)
    top, left, bottom, right = padding

    def function(x, weight, bias):
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride)

    inputs = {
        "x": numbers.normal(batch, c_in, h, w),
        "weight": numbers.normal(c_out, c_in, kernel, kernel),
        "bias": numbers.normal(c_out),
    }
    description = {"op": "conv2d", "kernel": kernel, "stride": stride, "padding": padding}
    record(case, description, inputs, function)


def convolutions():
    """3x3 with stride 1 and 2, 1x1."""
    around, below = [1, 1, 1, 1], [0, 0, 1, 1]
    for batch, channels, size in [
        (2, (3, 5), (1, 1)),
        (2, (5, 3), (3, 3)),
        (3, (7, 13), (7, 7)),
        (2, (3, 5), (5, 9)),
        (2, (1, 16), (28, 28)),
        (1, (16, 32), (28, 28)),
        (1, (17, 1), (28, 28)),
        (2, (32, 64), (2, 2)),
    ]:
        conv2d(batch, channels, size, 3, 1, around)
    for batch, channels, size in [
        (2, (3, 5), (7, 7)),
        (2, (8, 8), (28, 28)),
        (2, (7, 13), (5, 9)),
        (2, (5, 3), (1, 1)),
        (2, (16, 16), (14, 14)),
    ]:
        conv2d(batch, channels, size, 3, 2, around)
    for batch, channels, size in [
        (2, (3, 5), (6, 6)),
        (2, (3, 5), (7, 7)),
        (2, (7, 13), (5, 8)),
        (1, (8, 16), (28, 28)),
        (2, (5, 3), (2, 2)),
    ]:
        conv2d(batch, channels, size, 3, 2, below)
    for batch, channels, size in [
        (2, (3, 5), (1, 1)),
        (2, (7, 13), (5, 9)),
        (2, (24, 8), (7, 7)),
        (1, (32, 16), (28, 28)),
    ]:
        conv2d(batch, channels, size, 1, 1, [0, 0, 0, 0])


def group_norm(channels, groups, size, silu, kind="normal", eps=1e-5):
    """kind: normal, zero, constant, half_zero (one image of zeros) or offset (mean much larger than deviation)."""
    case = f"group_norm_c{channels}_g{groups}_{size[0]}x{size[1]}_{kind}{'_silu' if silu else ''}_eps{eps:g}"
    numbers = numbers_of(case)
    x = numbers.normal(2, channels, *size)
    if kind == "zero":
        x = torch.zeros_like(x)
    elif kind == "constant":
        x = torch.full_like(x, 2.5)
    elif kind == "half_zero":
        x[0] = 0
    elif kind == "offset":
        x = (x + 30).float().double()

    def function(x, weight, bias):
        y = F.group_norm(x, groups, weight, bias, eps)
        return F.silu(y) if silu else y

    inputs = {"x": x, "weight": numbers.normal(channels), "bias": numbers.normal(channels)}
    record(case, {"op": "group_norm", "groups": groups, "eps": eps, "silu": silu}, inputs, function)


def norms():
    """Groups of one channel up to all channels; from one pixel to a whole image."""
    for silu in (False, True):
        for channels, groups, size in [
            (8, 4, (1, 1)),
            (8, 1, (3, 3)),
            (12, 4, (7, 7)),
            (12, 1, (7, 7)),
            (8, 4, (28, 28)),
            (8, 8, (1, 1)),
        ]:
            group_norm(channels, groups, size, silu)
        for kind in ("zero", "constant", "half_zero", "offset"):
            group_norm(8, 4, (3, 3), silu, kind)
        group_norm(8, 4, (7, 7), silu, eps=1e-6)


def elementwise():
    """silu, add, add_bias, scale, concat, upsampling."""
    numbers = numbers_of("elementwise")
    edges = torch.tensor([0, -0.0, 1, -1, 20, -20, 88, -88, 100, -100, 1e-6, -1e-6]).double()
    record("silu_edges", {"op": "silu"}, {"x": edges.reshape(1, 12, 1, 1)}, F.silu)
    record("silu", {"op": "silu"}, {"x": 3 * numbers.normal(2, 5, 7, 9)}, F.silu)
    pair = {"a": numbers.normal(3, 5, 3, 4), "b": numbers.normal(3, 5, 3, 4)}
    record("add", {"op": "add"}, pair, torch.add)
    table = {"a": numbers.normal(1, 7), "b": numbers.normal(3, 7)}
    record("add_broadcast", {"op": "add"}, table, lambda a, b: a + b)
    record("scale", {"op": "scale", "factor": -2.5}, {"x": numbers.normal(2, 3, 4, 5)}, lambda x: -2.5 * x)
    for batch in (1, 3):
        inputs = {"x": numbers.normal(3, 5, 4, 3), "bias": numbers.normal(batch, 5)}
        record(
            f"add_bias_n{batch}", {"op": "add_bias"}, inputs, lambda x, bias: x + bias[:, :, None, None]
        )
    pair = {"a": numbers.normal(2, 3, 5, 4), "b": numbers.normal(2, 7, 5, 4)}
    record("concat", {"op": "concat"}, pair, lambda a, b: torch.cat([a, b], 1))
    for size in ((1, 1), (3, 5), (7, 7)):
        x = {"x": numbers.normal(2, 3, *size)}
        case = f"upsample_{size[0]}x{size[1]}"
        record(case, {"op": "upsample_nearest2x"}, x, lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"))
    record(
        "upsample_shared",
        {"op": "upsample_nearest2x", "then": "add silu(upsample_nearest2x(x)): the input is used twice"},
        {"x": numbers.normal(2, 3, 3, 4)},
        lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest")
        + F.interpolate(F.silu(x), scale_factor=2.0, mode="nearest"),
    )


def affine():
    """linear over [n, features], pointwise over the channels of [n, c, h, w], rows of a table."""
    numbers = numbers_of("affine")
    for batch, c_in, c_out in ((1, 4, 7), (5, 13, 3), (3, 32, 128)):
        inputs = {
            "x": numbers.normal(batch, c_in),
            "weight": numbers.normal(c_out, c_in),
            "bias": numbers.normal(c_out),
        }
        record(f"linear_{c_in}to{c_out}_n{batch}", {"op": "linear"}, inputs, F.linear)
    for batch, c_in, c_out, h, w in ((2, 8, 8, 7, 7), (3, 5, 11, 1, 1), (1, 16, 16, 3, 5)):
        inputs = {
            "x": numbers.normal(batch, c_in, h, w),
            "weight": numbers.normal(c_out, c_in),
            "bias": numbers.normal(c_out),
        }
        record(
            f"pointwise_{c_in}to{c_out}_{h}x{w}",
            {"op": "pointwise"},
            inputs,
            lambda x, weight, bias: torch.einsum("nihw,oi->nohw", x, weight) + bias[:, None, None],
        )
    record(
        "embedding",
        {"op": "embedding", "index": [10, 0, 3, 3]},
        {"weight": numbers.normal(11, 6)},
        lambda weight: F.embedding(torch.tensor([10, 0, 3, 3]), weight),
    )


def transposed(batch, channels, size, kernel, stride, padding):
    """conv_transpose2d; its weight is [in, out, kernel, kernel]."""
    (c_in, c_out), (h, w) = channels, size
    case = f"conv_transpose2d_{c_in}to{c_out}_{h}x{w}_n{batch}_k{kernel}s{stride}p{padding}"
    numbers = numbers_of(case)
    inputs = {
        "x": numbers.normal(batch, c_in, h, w),
        "weight": numbers.normal(c_in, c_out, kernel, kernel),
        "bias": numbers.normal(c_out),
    }
    description = {"op": "conv_transpose2d", "kernel": kernel, "stride": stride, "padding": padding}
    record(case, description, inputs, lambda x, weight, bias: F.conv_transpose2d(x, weight, bias, stride, padding))


def transposed_convolutions():
    """Kernel and stride 2 and 7, kernel 4 with stride 2, and odd sizes."""
    transposed(2, (5, 3), (3, 4), 2, 2, 0)
    transposed(3, (16, 9), (7, 7), 2, 2, 0)
    transposed(2, (6, 7), (1, 1), 7, 7, 0)
    transposed(2, (8, 8), (5, 3), 4, 2, 1)
    transposed(9, (3, 5), (4, 4), 3, 2, 1)
    transposed(2, (4, 6), (5, 5), 3, 1, 1)


def batch_norm(channels, size):
    """Fixed statistics, as a model in evaluation mode has them."""
    case = f"batch_norm_c{channels}_{size[0]}x{size[1]}"
    numbers = numbers_of(case)
    mean, variance = numbers.normal(channels), numbers.normal(channels) ** 2 + 0.1
    TENSORS[f"{case}.running_mean"], TENSORS[f"{case}.running_var"] = mean, variance
    inputs = {
        "x": numbers.normal(3, channels, *size),
        "weight": numbers.normal(channels),
        "bias": numbers.normal(channels),
    }
    # As the file keeps them in f32, the reference takes them from there.
    mean, variance = mean.float().double(), variance.float().double()
    record(
        case,
        {"op": "batch_norm", "eps": 1e-5},
        inputs,
        lambda x, weight, bias: F.batch_norm(x, mean, variance, weight, bias, False, 0.1, 1e-5),
    )


def pools_and_activations():
    """Sizes that do not divide, equal values, exact zeros, inputs used twice."""
    numbers = numbers_of("pools")
    for h, w, size in ((4, 4, 2), (7, 5, 2), (7, 7, 7), (9, 6, 3)):
        x = numbers.normal(3, 5, h, w)
        pools = {"max": lambda x, k=size: F.max_pool2d(x, k), "average": lambda x, k=size: F.avg_pool2d(x, k)}
        for name, function in pools.items():
            case = f"{name}_pool{size}_{h}x{w}"
            record(case, {"op": "pool", "pool": name, "size": size}, {"x": x}, function)
    equal = F.relu(numbers.normal(2, 3, 6, 6)).round()
    record("max_pool2_equal", {"op": "pool", "pool": "max", "size": 2}, {"x": equal}, lambda x: F.max_pool2d(x, 2))
    record(
        "max_pool_shared",
        {"op": "pool", "pool": "max", "size": 2, "then": "concat(pool(x), pool(relu(x))): the input is used twice"},
        {"x": numbers.normal(2, 3, 4, 6)},
        lambda x: torch.cat([F.max_pool2d(x, 2), F.max_pool2d(F.relu(x), 2)], 1),
    )
    edges = torch.tensor([0, -0.0, 1, -1, 5, -5, 20, -20, 60, -60, 1e-6, -1e-6]).double().reshape(1, 12, 1, 1)
    for name in ("gelu", "relu", "mish"):
        function = getattr(F, name)
        record(f"{name}_edges", {"op": name}, {"x": edges}, function)
        record(name, {"op": name}, {"x": 3 * numbers.normal(2, 5, 7, 9)}, function)


def channels():
    """Parts of the channels, and factors per channel."""
    numbers = numbers_of("channels")
    x = {"x": numbers.normal(3, 7, 4, 5)}
    record("narrow_image", {"op": "narrow", "first": 2, "count": 3}, x, lambda x: x[:, 2:5])
    x = {"x": numbers.normal(3, 8)}
    record("narrow_features", {"op": "narrow", "first": 4, "count": 4}, x, lambda x: x[:, 4:8])
    for batch in (1, 3):
        inputs = {"x": numbers.normal(3, 5, 4, 3), "b": numbers.normal(batch, 5)}
        record(
            f"scale_channels_n{batch}", {"op": "scale_channels"}, inputs, lambda x, b: x * b[:, :, None, None]
        )


def attention():
    """softmax over the keys of q·k / sqrt(c / heads); head i takes the channels from i·c/heads."""
    for batch, channels, heads, (h, w) in (
        (2, 8, 1, (3, 3)),
        (2, 16, 2, (7, 7)),
        (1, 6, 2, (2, 5)),
        (3, 8, 2, (1, 1)),
        (1, 32, 1, (7, 7)),
    ):
        case = f"attention_c{channels}_h{heads}_{h}x{w}"
        numbers = numbers_of(case)

        def function(q, k, v, channels=channels, heads=heads):
            def rows(x):
                return x.reshape(x.shape[0], heads, channels // heads, -1).transpose(2, 3)

            weights = (rows(q) @ rows(k).transpose(2, 3) * (channels / heads) ** -0.5).softmax(-1)
            return (weights @ rows(v)).transpose(2, 3).reshape(q.shape)

        inputs = {key: 2 * numbers.normal(batch, channels, h, w) for key in ("q", "k", "v")}
        record(case, {"op": "attention", "heads": heads}, inputs, function)


def timestep_embeddings():
    """The two forms the fixtures use, and a fractional step."""
    for features, flip, shift in ((16, True, 0), (8, False, 1), (128, False, 1)):
        case = f"timestep_embedding_{features}_{'cos_sin' if flip else 'sin_cos'}_shift{shift}"
        t = torch.tensor([0, 1, 437, 999, 12.5])
        CASES[case] = {"op": "timestep_embedding", "features": features, "flip": flip, "freq_shift": shift}
        TENSORS[f"{case}.t"] = t
        TENSORS[f"{case}.y"] = get_timestep_embedding(t, features, flip, shift)


def main():
    """Writes everything."""
    convolutions()
    norms()
    elementwise()
    affine()
    transposed_convolutions()
    for count, size in ((5, (3, 4)), (16, (7, 7))):
        batch_norm(count, size)
    pools_and_activations()
    channels()
    attention()
    timestep_embeddings()
    save("ops", TENSORS, CASES)
    print(f"  {len(CASES)} cases")


if __name__ == "__main__":
    main()
