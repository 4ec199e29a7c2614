"""What the golden scripts share: pinned versions, seeded numbers, the tiny networks, the file writer.

Reference values are computed in f64 from f32 weights and inputs, and rounded to f32 when they are stored; they
are therefore nearer to the truth than any f32 implementation, and a regeneration gives the same bytes. One part of
diffusers stays f32 even then: the sinusoidal embedding of the timestep.
Must not contain reference values of its own: each golden_*.py makes those of one subject.
"""

import json
import sys
from importlib import metadata
from pathlib import Path

PINS = {"torch": "2.15.", "diffusers": "0.42.", "safetensors": "0.8.", "numpy": "2."}
ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
FIXTURES = ROOT / "tests" / "fixtures"
T_GEN = 440


def check_versions():
    """Stops where a package is missing or is not the pinned version."""
    for package, pin in PINS.items():
        try:
            got = metadata.version(package)
        except metadata.PackageNotFoundError:
            got = "none"
        if not got.startswith(pin):
            sys.exit(
                f"error: got {package} {got}, expected {pin}x\n\n"
                "hint: pip install -r scripts/golden-requirements.txt"
            )


check_versions()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import DDPMScheduler, UNet2DModel  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


class Numbers:
    """Seeded f32 numbers, handed out as f64."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape):
        """Standard normal values that f32 can hold, in f64."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float32).double()

    def integers(self, low, high, *shape):
        """Integers in low..high, high excluded."""
        return torch.randint(low, high, shape, generator=self.generator)


def save(name, tensors, cases=None):
    """Writes tests/golden/NAME.safetensors; f64 values are rounded to f32 unless their name ends in `.f64`."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    stored = {}
    for key, value in tensors.items():
        value = value.detach().contiguous().clone()
        if value.is_floating_point() and not key.endswith(".f64"):
            value = value.float()
        if value.is_floating_point() and not torch.isfinite(value).all():
            sys.exit(f"error: `{key}` of {name} is not finite")
        stored[key] = value
    header = None if cases is None else {"cases": json.dumps(cases, sort_keys=True)}
    path = GOLDEN / f"{name}.safetensors"
    save_file(stored, path, metadata=header)
    path.chmod(0o644)
    print(f"{path.relative_to(ROOT)}: {len(stored)} tensors, {path.stat().st_size} bytes")


def randomise(model, seed):
    """Replaces every parameter, so that nothing hides behind an initial 0 or 1."""
    numbers = Numbers(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = numbers.normal(*parameter.shape).float()
            if parameter.ndim > 1:
                fan_in = 1 if name.startswith("class_embedding") else parameter[0].numel()
                parameter.copy_(noise * fan_in**-0.5)
            elif "norm" in name and name.endswith(".weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model


def perturbed(model, seed, size):
    """A copy in f64 whose every parameter p has become p + size·rms(p)·noise, rounded to f32."""
    numbers = Numbers(seed)
    copy = UNet2DModel.from_config(model.config)
    with torch.no_grad():
        for (name, target), (_, source) in zip(
            sorted(copy.named_parameters()), sorted(model.named_parameters()), strict=True
        ):
            rms = source.float().square().mean().sqrt()
            target.copy_(source.float() + size * rms * numbers.normal(*source.shape).float())
    return copy.double().eval()


def tiny_ddpm():
    """The features of google/ddpm-cifar10-32 in small: asymmetric padding, sine first, one head, no class."""
    model = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_num_groups=4,
        norm_eps=1e-6,
        attention_head_dim=None,
    )
    return randomise(model, 1).eval()


def tiny_class():
    """The bundled base in small: symmetric padding, cosine first, two heads, sizes 12, 6, 3, 10 classes + none."""
    model = UNet2DModel(
        sample_size=12,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        num_class_embeds=11,
    )
    return randomise(model, 2).eval()


def ddpm_scheduler():
    """The scheduler of both fixtures: linear betas, 1000 steps."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=2e-2,
        variance_type="fixed_large",
        clip_sample=True,
    )


def alphas_cumprod(start=1e-4, end=2e-2, steps=1000):
    """The linear schedule in f64."""
    return np.cumprod(1.0 - np.linspace(start, end, steps))


def alpha_sigma(t, dtype=torch.float64):
    """alpha_t and sigma_t of the fixtures' schedule, `[b, 1, 1, 1]` for timesteps `[b]`, computed in f64."""
    kept = torch.from_numpy(alphas_cumprod())[t].reshape(-1, 1, 1, 1)
    return kept.sqrt().to(dtype), (1 - kept).sqrt().to(dtype)
