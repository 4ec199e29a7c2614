"""Writes tests/golden/README.md: what every golden file and fixture holds, who made it, and its SHA-256.

Run it after the other golden scripts; tests/core.rs checks the table against the files. Must not compute references.
"""

import hashlib
import sys
from importlib import metadata

from golden_common import FIXTURES, GOLDEN, PINS, ROOT

WEIGHTS = "diffusion_pytorch_model.safetensors"
CIFAR = FIXTURES / "cifar-10-batches-py"
FOLDERS = [GOLDEN, CIFAR, CIFAR / "code", *(FIXTURES / name for name in ("pickles", "tiny-class", "tiny-ddpm"))]
HOLDS = {
    GOLDEN / "adversarial.safetensors": (
        "golden_adversarial.py",
        "DMD2's adversarial losses with all gradients, on the networks of losses.safetensors; a discriminator on tiny-ddpm",
    ),
    GOLDEN / "bases.safetensors": (
        "golden_bases.py",
        "the three reference bases at full size: eps_pred; eight small networks with every option: eps_pred and all gradients; weights"
        " come from seeds",
    ),
    GOLDEN / "batch_norm.safetensors": (
        "golden_batch_norm.py",
        "BatchNorm by the statistics of its batch, 9 cases: result, gradients, running statistics after",
    ),
    GOLDEN / "inception.safetensors": ("golden_inception.py", "pytorch-fid's Inception-v3 with weights from a seed: features of three batches"),
    GOLDEN / "losses.safetensors": (
        "golden_losses.py",
        "the DM, regression and critic losses with all gradients (`once.`, `grad.`), ten AdamW steps (`steps.`, `final.`);"
        " the order of operations is in the script's header",
    ),
    GOLDEN / "lpips.safetensors": (
        "golden_lpips.py",
        "LPIPS by the package lpips on VGG16 and AlexNet with weights from seeds: distances and gradients; in the script's header",
    ),
    GOLDEN / "metrics.safetensors": (
        "golden_metrics.py",
        "Fréchet distance, unbiased kernel distance, precision, recall, density, coverage of three small sets by numpy and"
        " scipy; classes, entropy; in the script's header",
    ),
    GOLDEN / "noise.safetensors": ("golden_noise.py", "noise contract `dmd-noise-1` from plain Python (`docs/noise.md`)"),
    GOLDEN / "one_step.safetensors": ("golden_unet.py", "tiny-class as a one-step generator: t_gen 440, input scale 1"),
    GOLDEN / "ops.safetensors": ("golden_ops.py", "99 single operations: result and gradients; naming in the script's header"),
    GOLDEN / "schedule.safetensors": (
        "golden_schedule.py",
        "betas and alphas_cumprod in f64; ten steps of tiny-class with every image and network output, by DDIM (plain, clipped,"
        " with the output read as velocity or image) and by ancestral sampling (both variances, velocity; with its noise)",
    ),
    GOLDEN / "unet_tiny_class.safetensors": (
        "golden_unet.py",
        "tiny-class: eps_pred at three timesteps, gradient of mean(eps_pred·cotangent) for every parameter and x_t",
    ),
    GOLDEN / "unet_tiny_ddpm.safetensors": ("golden_unet.py", "the same for tiny-ddpm"),
    CIFAR / "code" / "data_batch_1": ("golden_cifar.py", "a pickle that would run a command"),
    **{
        CIFAR / name: ("golden_cifar.py", "CIFAR-10's Python version, one or two images per file")
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
    },
    FIXTURES / "pickles" / "celeba.pt": ("golden_pickles.py", "small CelebaUNet as a training program saves it"),
    FIXTURES / "pickles" / "code.pth": ("golden_pickles.py", "a pickle that would run a command"),
    FIXTURES / "pickles" / "mnist.pth": ("golden_pickles.py", "small ContextUnet as Conditional_Diffusion_MNIST saves it"),
    FIXTURES / "tiny-class" / "config.json": ("golden_unet.py", "the bundled base in small: 12x12x1, 10 classes + none"),
    FIXTURES / "tiny-class" / WEIGHTS: ("golden_unet.py", "random weights, 52,337 numbers"),
    FIXTURES / "tiny-class" / "scheduler_config.json": ("golden_unet.py", "linear, 1000 steps"),
    FIXTURES / "tiny-ddpm" / "config.json": ("golden_unet.py", "google/ddpm-cifar10-32 in small: 16x16x3"),
    FIXTURES / "tiny-ddpm" / WEIGHTS: ("golden_unet.py", "random weights, 64,483 numbers"),
    FIXTURES / "tiny-ddpm" / "scheduler_config.json": ("golden_unet.py", "linear, 1000 steps"),
}

TEXT = """# Golden data

Reference values by PyTorch and diffusers, numpy and scipy, computed in f64 from f32 weights and inputs and rounded to f32 (names that end in
`.f64` are stored in f64). All random inputs are in the files.

## Regenerate

```sh
scripts/setup pytorch && . scripts/env && "$DMD_PYTORCH" -m pip install -r scripts/golden-metrics-requirements.txt
for subject in unet bases schedule losses adversarial ops batch_norm noise metrics inception lpips pickles cifar readme; do
    "$DMD_PYTORCH" scripts/golden_$subject.py
done
```

The same bytes came out of repeated runs; another processor may change a last bit. Made with
{versions}.

## Comparing

- Gradients are small (a mean over all elements): measure an error against the largest value of its tensor.
- The gradient of a `to_k.bias` is 0 in exact arithmetic (softmax does not see it): expect noise there, and steps of
  either sign after AdamW. It does not reach any output. For scale: PyTorch's own f32 ends the ten steps of `losses.safetensors`
  within 3e-6 of the f64 weights, and within 3e-7 relative of the losses, but up to 1e-3 away in `to_k.bias`.
- Other gradients are 0 in exact arithmetic too: that of a bias before GroupNorm over its channel alone (`up.7.res_blk.conv1.bias`
  of small-celeba), and those of GroupNorm over a single value or of constant images. Goldens have at most 1e-12 there. Over two
  values (`group_norm_c8_g4_1x1`) the gradient is a difference of numbers a thousand times as large and more: PyTorch's own f32 is up
  to 9e-4 of the largest value away from f64; ours is computed in f64.
- diffusers computes the sinusoidal time embedding in f32 even in f64 networks: at t = 999 its angles are off by up to 6e-5.

## Files

| file | made by | holds | sha256 |
|---|---|---|---|
{rows}
"""


def main():
    """Writes the page; stops where a file is missing or not described."""
    paths = (path for folder in FOLDERS for path in folder.iterdir())
    present = {path for path in paths if path.is_file() and path.name != "README.md"}
    if present != set(HOLDS):
        sys.exit(f"error: files and descriptions differ: {sorted(map(str, present ^ set(HOLDS)))}")
    rows = []
    for path, (script, holds) in HOLDS.items():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append(f"| `{path.relative_to(ROOT)}` | `{script}` | {holds} | `{digest}` |")
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in (*PINS, "scipy", "torchvision", "pytorch-fid"))
    (GOLDEN / "README.md").write_text(TEXT.format(rows="\n".join(rows), versions=versions))


if __name__ == "__main__":
    main()
