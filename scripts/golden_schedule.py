"""Noise schedules, and DDIM trajectories of the tiny-class fixture, as diffusers computes them.

Writes tests/golden/schedule.safetensors. The f64 tables follow diffusers' formulas and are checked here against
the f32 tables of its DDPMScheduler. The trajectories are DDIMScheduler's with eta 0, timestep_spacing "trailing"
and set_alpha_to_one; the clipped one passes use_clipped_model_output, so that the noise is recomputed from the
clipped image. The scheduler keeps its own f32 table there; images and network outputs are f64.
"""

import math

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from golden_common import FIXTURES, Numbers, save

STEPS = 10
SCHEDULES = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2, "num_train_timesteps": 1000},
    "linear_400": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2, "num_train_timesteps": 400},
    "scaled_linear": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
    },
    "squaredcos_cap_v2": {
        "beta_schedule": "squaredcos_cap_v2",
        "beta_start": 1e-4,
        "beta_end": 2e-2,
        "num_train_timesteps": 1000,
    },
}


def betas(config):
    """Diffusers' betas in f64."""
    start, end, steps = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    if config["beta_schedule"] == "linear":
        return np.linspace(start, end, steps)
    if config["beta_schedule"] == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, steps) ** 2

    def kept(i):
        return math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - kept(i + 1) / kept(i), 0.999) for i in range(steps)])


def tables():
    """betas and alphas_cumprod of every schedule, checked against diffusers' own f32 tables."""
    tensors = {}
    for name, config in SCHEDULES.items():
        own = DDPMScheduler(**config)
        table = betas(config)
        kept = np.cumprod(1 - table)
        np.testing.assert_allclose(own.betas.numpy(), table, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(own.alphas_cumprod.numpy(), kept, rtol=2e-4, atol=0)
        tensors[f"{name}.betas.f64"] = torch.from_numpy(table)
        tensors[f"{name}.alphas_cumprod.f64"] = torch.from_numpy(kept)
    return tensors


def trajectory(prefix, clip):
    """The images x[0] = z to x[STEPS] and the network's outputs on the way."""
    model = UNet2DModel.from_pretrained(FIXTURES / "tiny-class", low_cpu_mem_usage=False).double().eval()
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=2e-2,
        beta_schedule="linear",
        clip_sample=clip,
        clip_sample_range=1.0,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(STEPS)
    labels = torch.tensor([7, 2])
    images, outputs = [Numbers(40).normal(2, 1, 12, 12)], []
    for t in scheduler.timesteps:
        with torch.no_grad():
            eps_pred = model(images[-1], t, labels).sample
        step = scheduler.step(eps_pred, t, images[-1], eta=0.0, use_clipped_model_output=True)
        outputs.append(eps_pred)
        images.append(step.prev_sample)
    print(f"  {prefix}: largest value {max(image.abs().max().item() for image in images):.2f}")
    return {
        f"{prefix}.class": labels,
        f"{prefix}.timesteps": scheduler.timesteps,
        f"{prefix}.x": torch.stack(images),
        f"{prefix}.eps_pred": torch.stack(outputs),
    }


def main():
    """Writes everything."""
    tensors = tables() | trajectory("ddim", clip=False) | trajectory("ddim_clip", clip=True)
    save("schedule", tensors, SCHEDULES)


if __name__ == "__main__":
    main()
