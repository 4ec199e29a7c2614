"""Predicted noise of the reference bases at full size, and of small networks with every option, with gradients.

Writes tests/golden/bases.safetensors. Weights are not stored: both sides make them from a seed (`seeded_weights` here,
`dmd_tests::seeded` there). The header's `cases` maps CASE to its `config` and `seed`; `CASE.x_t`, `CASE.t`, `CASE.class`
are the inputs, `CASE.eps_pred` the result; small cases also have `CASE.cotangent` and `CASE.grad.NAME`, the gradients of
mean(eps_pred·cotangent).

diffusers' own UNet2DModel is the reference for its configurations. The two other networks are written here as functions of
a state dict, from a description of their layers, so that nothing of the originals is copied; their statistics are fixed.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from golden_common import save

MASK = np.uint64(0xFFFFFFFFFFFFFFFF)
TENSORS, CASES = {}, {}


def uniform(seed, stream, count):
    """Numbers k/2^23 - 1 with 24-bit k from splitmix64: the same f32 bits everywhere."""
    with np.errstate(over="ignore"):
        z = np.arange(count, dtype=np.uint64) + np.uint64((seed << 48) + (stream << 32))
        z = z * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float64) / 2.0**23 - 1.0


def seeded_weights(shapes, seed):
    """Weights by name; the stream of a tensor is its place in the order of the names."""
    weights = {}
    for stream, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        u = uniform(seed, stream, math.prod(shape))
        if name == "time_embed.weight":
            value = time_table(*shape)
        elif name.endswith("running_var"):
            value = 1 + 0.5 * u
        elif len(shape) == 1:
            value = 1 + 0.1 * u if name.endswith(".weight") else 0.1 * u
        else:
            value = u * math.sqrt(3 / math.prod(shape[1:]))
        weights[name] = torch.from_numpy(value.astype(np.float32)).reshape(shape).double()
    return weights


def time_table(steps, features):
    """[sin of the first half of the frequencies, cos of the second]."""
    j = np.arange(features)
    angle = np.arange(steps)[:, None] * 10000.0 ** (-2 * j / features)
    return np.where(j < features // 2, np.sin(angle), np.cos(angle))


def context_shapes(config):
    """Parameters and statistics of `ContextUnet`."""
    c, k, side = config["n_feat"], config["n_classes"], config["sample_size"] // 4
    image = config["in_channels"]
    shapes = {}

    def affine(name, *weight, out=None):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, (out or weight[0],)

    def block(path, channels_in, channels_out):
        for conv, i in (("conv1", channels_in), ("conv2", channels_out)):
            affine(f"{path}.{conv}.0", channels_out, i, 3, 3)
            affine(f"{path}.{conv}.1", channels_out)
            for statistic in ("running_mean", "running_var"):
                shapes[f"{path}.{conv}.1.{statistic}"] = (channels_out,)

    block("init_conv", image, c)
    block("down1.model.0", c, c)
    block("down2.model.0", c, 2 * c)
    affine("up0.0", 2 * c, 2 * c, side, side)
    affine("up0.1", 2 * c)
    for level, width, source in ((1, 2 * c, 4 * c), (2, c, 2 * c)):
        for name, inputs in ((f"contextembed{level}", k), (f"timeembed{level}", 1)):
            affine(f"{name}.model.0", width, inputs)
            affine(f"{name}.model.2", width, width)
        affine(f"up{level}.model.0", source, c, 2, 2, out=c)
        block(f"up{level}.model.1", c, c)
        block(f"up{level}.model.2", c, c)
    affine("out.0", c, 2 * c, 3, 3)
    affine("out.1", c)
    affine("out.3", image, c, 3, 3)
    return shapes


def context_unet(w, config, x, t, label):
    """Predicted noise; the label n_classes drops the class."""
    classes, side = config["n_classes"], config["sample_size"] // 4
    hot = -F.one_hot(label, classes + 1)[:, :classes].double()
    time = (t.double() / config["n_steps"])[:, None]

    def layer(y, name):
        y = F.conv2d(y, w[f"{name}.0.weight"], w[f"{name}.0.bias"], padding=1)
        mean, var = w[f"{name}.1.running_mean"], w[f"{name}.1.running_var"]
        return F.gelu(F.batch_norm(y, mean, var, w[f"{name}.1.weight"], w[f"{name}.1.bias"]))

    def block(y, path, residual=False):
        a = layer(y, f"{path}.conv1")
        b = layer(a, f"{path}.conv2")
        return (a + b) / 1.414 if residual else b

    def mlp(y, name):
        y = F.gelu(F.linear(y, w[f"{name}.model.0.weight"], w[f"{name}.model.0.bias"]))
        return F.linear(y, w[f"{name}.model.2.weight"], w[f"{name}.model.2.bias"])[:, :, None, None]

    def relu_norm(y, name):
        return F.relu(F.group_norm(y, 8, w[f"{name}.weight"], w[f"{name}.bias"]))

    def up(y, skip, name):
        y = torch.cat([y, skip], 1)
        y = F.conv_transpose2d(y, w[f"{name}.model.0.weight"], w[f"{name}.model.0.bias"], stride=2)
        return block(block(y, f"{name}.model.1"), f"{name}.model.2")

    x0 = block(x, "init_conv", residual=True)
    d1 = F.max_pool2d(block(x0, "down1.model.0"), 2)
    d2 = F.max_pool2d(block(d1, "down2.model.0"), 2)
    hidden = F.gelu(F.avg_pool2d(d2, side))
    u = F.conv_transpose2d(hidden, w["up0.0.weight"], w["up0.0.bias"], stride=side)
    u = relu_norm(u, "up0.1")
    u = up(mlp(hot, "contextembed1") * u + mlp(time, "timeembed1"), d2, "up1")
    u = up(mlp(hot, "contextembed2") * u + mlp(time, "timeembed2"), d1, "up2")
    y = F.conv2d(torch.cat([u, x0], 1), w["out.0.weight"], w["out.0.bias"], padding=1)
    return F.conv2d(relu_norm(y, "out.1"), w["out.3.weight"], w["out.3.bias"], padding=1)


def celeba_shapes(config):
    """Parameters of `CelebaUNet`, its frozen table included."""
    c, image, features = config["channels"], config["in_channels"], 4 * config["channels"]
    shapes = {"time_embed.weight": (config["n_steps"], features)}

    def affine(name, *weight, out=None):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, (out or weight[0],)

    def residual(path, inputs, outputs):
        affine(f"{path}.norm1", inputs)
        affine(f"{path}.conv1", outputs, inputs, 3, 3)
        affine(f"{path}.time_fc", inputs, features)

    def attention(path, channels):
        affine(f"{path}.norm", channels)
        affine(f"{path}.fc", 3 * channels, channels)
        affine(f"{path}.last_fc", channels, channels)

    affine("conv1", c, image, 3, 3)
    residual("down.0.res", c, c)
    affine("down.1", c, c, 3, 3)
    residual("down.2.res", c, 2 * c)
    affine("down.3", 2 * c, 2 * c, 3, 3)
    residual("down.4.res", 2 * c, 4 * c)
    attention("down.4.attn", 4 * c)
    residual("middle.res1", 4 * c, 4 * c)
    attention("middle.attn", 4 * c)
    residual("middle.res2", 4 * c, 4 * c)
    residual("up.0.res_blk", 8 * c, 4 * c)
    attention("up.0.attn", 4 * c)
    residual("up.1.res_blk", 6 * c, 2 * c)
    attention("up.1.attn", 2 * c)
    affine("up.2", 2 * c, 2 * c, 4, 4)
    residual("up.3.res_blk", 4 * c, 2 * c)
    residual("up.4.res_blk", 3 * c, c)
    affine("up.5", c, c, 4, 4)
    residual("up.6.res_blk", 2 * c, c)
    residual("up.7.res_blk", 2 * c, c)
    affine("norm", c)
    affine("last", image, c, 3, 3)
    return shapes


def celeba_unet(w, config, x, t, _label):
    """Predicted noise; skips are kept after the time bias of the block they feed."""
    time = F.silu(w["time_embed.weight"][t.long()])

    def conv(y, name, stride=1):
        return F.conv2d(y, w[f"{name}.weight"], w[f"{name}.bias"], stride, padding=1)

    def biased(y, path):
        return y + F.linear(time, w[f"{path}.time_fc.weight"], w[f"{path}.time_fc.bias"])[:, :, None, None]

    def block(y, path):
        return conv(F.silu(F.group_norm(y, 8, w[f"{path}.norm1.weight"], w[f"{path}.norm1.bias"])), f"{path}.conv1")

    def attention(y, path):
        n, c, h, s = y.shape
        rows = y.flatten(2).transpose(1, 2)
        q, k, v = F.linear(rows, w[f"{path}.fc.weight"], w[f"{path}.fc.bias"]).chunk(3, 2)
        mixed = torch.softmax(q @ k.transpose(1, 2) * c**-0.5, -1) @ v
        mixed = F.linear(mixed, w[f"{path}.last_fc.weight"], w[f"{path}.last_fc.bias"])
        return y + mixed.transpose(1, 2).reshape(n, c, h, s)

    def up(y, skip, path):
        return block(biased(torch.cat([y, skip], 1), path), path)

    def double(y, name):
        return F.conv_transpose2d(y, w[f"{name}.weight"], w[f"{name}.bias"], stride=2, padding=1)

    skips = [biased(conv(x, "conv1"), "down.0.res")]
    skips.append(block(skips[-1], "down.0.res"))
    skips.append(biased(conv(skips[-1], "down.1", 2), "down.2.res"))
    skips.append(block(skips[-1], "down.2.res"))
    skips.append(biased(conv(skips[-1], "down.3", 2), "down.4.res"))
    y = attention(block(skips[-1], "down.4.res"), "down.4.attn")
    skips.append(biased(y, "middle.res1"))
    y = attention(block(skips[-1], "middle.res1"), "middle.attn")
    y = block(biased(y, "middle.res2"), "middle.res2")
    y = attention(up(y, skips[5], "up.0.res_blk"), "up.0.attn")
    y = attention(up(y, skips[4], "up.1.res_blk"), "up.1.attn")
    y = double(y, "up.2")
    y = up(up(y, skips[3], "up.3.res_blk"), skips[2], "up.4.res_blk")
    y = double(y, "up.5")
    y = up(up(y, skips[1], "up.6.res_blk"), skips[0], "up.7.res_blk")
    return conv(F.silu(F.group_norm(y, 8, w["norm.weight"], w["norm.bias"])), "last")


def diffusers_unet(w, config, x, t, label):
    """UNet2DModel with these weights."""
    model = UNet2DModel.from_config(config).double().eval()
    arguments = {} if label is None else {"class_labels": label}
    return torch.func.functional_call(model, w, (x, t), arguments).sample


def case(name, config, seed, steps, classes=None, gradients=False):
    """Runs one network."""
    kind = config["_class_name"]
    if kind == "UNet2DModel":
        model = UNet2DModel.from_config(config)
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        function = diffusers_unet
    elif kind == "ContextUnet":
        shapes, function = context_shapes(config), context_unet
    else:
        shapes, function = celeba_shapes(config), celeba_unet
    weights = seeded_weights(shapes, seed)
    side, channels = config["sample_size"], config["in_channels"]
    shape = (len(steps), channels, side, side)
    draw = lambda stream: torch.from_numpy(uniform(seed, stream, math.prod(shape))).reshape(shape) * math.sqrt(3)
    x_t, cotangent = draw(60_000).float().double(), draw(60_001).float().double()
    t = torch.tensor(steps)
    label = None if classes is None else torch.tensor(classes)
    frozen = ("running_mean", "running_var", "time_embed.weight")
    if gradients:
        for key, value in weights.items():
            value.requires_grad_(not key.endswith(frozen))
    with torch.set_grad_enabled(gradients):
        eps_pred = function(weights, config, x_t, t, label)
    counted = sum(math.prod(s) for key, s in shapes.items() if not key.endswith(("running_mean", "running_var")))
    CASES[name] = {"config": config, "seed": seed, "parameters": counted}
    TENSORS[f"{name}.x_t"], TENSORS[f"{name}.t"], TENSORS[f"{name}.eps_pred"] = x_t, t, eps_pred
    if label is not None:
        TENSORS[f"{name}.class"] = label
    if gradients:
        (eps_pred * cotangent).mean().backward()
        TENSORS[f"{name}.cotangent"] = cotangent
        for key, value in weights.items():
            if value.requires_grad:
                TENSORS[f"{name}.grad.{key}"] = torch.zeros_like(value) if value.grad is None else value.grad
    print(f"  {name}: {counted} parameters, deviation {eps_pred.std().item():.3f}")


CIFAR10 = {
    "_class_name": "UNet2DModel",
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "act_fn": "silu",
}
SMALL = {
    **CIFAR10,
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
CONTEXT = {"_class_name": "ContextUnet", "sample_size": 28, "in_channels": 1, "n_classes": 10, "n_steps": 400}
CELEBA = {"_class_name": "CelebaUNet", "sample_size": 32, "in_channels": 3, "n_steps": 1000}


def main():
    """Writes everything."""
    case("ddpm-cifar10", CIFAR10, 1, [999, 5])
    case("ddpm-mnist", {**CONTEXT, "n_feat": 128}, 2, [400, 1, 200], [3, 0, 10])
    case("ddpm-celeba", {**CELEBA, "channels": 16}, 3, [999, 0, 500])
    case("small-mnist", {**CONTEXT, "n_feat": 16, "sample_size": 12}, 4, [400, 1, 200], [3, 0, 10], gradients=True)
    case("small-celeba", {**CELEBA, "channels": 8, "sample_size": 16, "n_steps": 50}, 5, [49, 0, 25], gradients=True)
    resnet = {
        "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    }
    attention = {
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
    }
    variants = {
        "heads": {"attention_head_dim": 4},
        "scale-shift": {"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 4},
        "resnet-blocks": {**resnet, "act_fn": "gelu"},
        "resnet-resampling": {**attention, "downsample_type": "resnet", "upsample_type": "resnet", "act_fn": "mish"},
        "middle": {"mid_block_scale_factor": 1.5, "act_fn": "relu", "downsample_padding": 1, "flip_sin_to_cos": True},
        "three-levels": {
            "sample_size": 16,
            "block_out_channels": [8, 8, 16],
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "add_attention": False,
        },
    }
    for i, (name, change) in enumerate(variants.items()):
        classes = [1, 3] if "num_class_embeds" in change else None
        case(f"small-{name}", {**SMALL, **change}, 10 + i, [7, 900], classes, gradients=True)
    save("bases", TENSORS, CASES)


if __name__ == "__main__":
    main()
