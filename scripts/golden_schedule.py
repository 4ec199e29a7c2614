"""Noise schedules, and DDIM and DDPM trajectories of the tiny-class fixture, as diffusers computes them.

Writes tests/golden/schedule.safetensors. The f64 tables follow diffusers' formulas and are checked here against
the f32 tables of its DDPMScheduler. The trajectories are DDIMScheduler's with eta 0, timestep_spacing "trailing"
and set_alpha_to_one; the clipped one passes use_clipped_model_output, so that the noise is recomputed from the
clipped image. The ancestral ones are DDPMScheduler's, whose noise is drawn here; for other predictions than of noise
the network's output is read as such. The schedulers keep their own f32 tables there; images and outputs are f64.
"""

import math

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.schedulers import scheduling_ddpm
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
    "trained": {"trained_betas": [0.001, 0.02, 0.02, 0.3, 0.05], "num_train_timesteps": 5},
}


def betas(config):
    """Diffusers' betas in f64."""
    if "trained_betas" in config:
        return np.array(config["trained_betas"])
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


def trajectory(prefix, scheduler, **step_options):
    """The images x[0] = z to x[STEPS], the network's outputs on the way and the noise that was added."""
    model = UNet2DModel.from_pretrained(FIXTURES / "tiny-class", low_cpu_mem_usage=False).double().eval()
    scheduler.set_timesteps(STEPS)
    labels = torch.tensor([7, 2])
    numbers = Numbers(40)
    images, outputs, noises = [numbers.normal(2, 1, 12, 12)], [], []

    def noise(shape, **_):
        noises.append(numbers.normal(*shape))
        return noises[-1]

    scheduling_ddpm.randn_tensor = noise
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = model(images[-1], t, labels).sample
        step = scheduler.step(output, t, images[-1], **step_options)
        outputs.append(output)
        images.append(step.prev_sample)
    print(f"  {prefix}: largest value {max(image.abs().max().item() for image in images):.2f}")
    tensors = {
        f"{prefix}.timesteps": scheduler.timesteps,
        f"{prefix}.x": torch.stack(images),
        f"{prefix}.output": torch.stack(outputs),
    }
    return tensors | ({f"{prefix}.noise": torch.stack(noises)} if noises else {})


def trajectories():
    """One for every way of sampling."""
    common = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 2e-2, "timestep_spacing": "trailing"}

    def ddim(**options):
        return DDIMScheduler(**common, set_alpha_to_one=True, **options)

    def ddpm(**options):
        return DDPMScheduler(**common, **options)

    exact = {"eta": 0.0, "use_clipped_model_output": True}
    return (
        trajectory("ddim", ddim(clip_sample=False), **exact)
        | trajectory("ddim_clip", ddim(clip_sample=True), **exact)
        | trajectory("ddim_v", ddim(clip_sample=True, prediction_type="v_prediction"), **exact)
        | trajectory("ddim_sample", ddim(clip_sample_range=1.5, prediction_type="sample"), **exact)
        | trajectory("ddpm_small", ddpm(variance_type="fixed_small"))
        | trajectory("ddpm_large", ddpm(variance_type="fixed_large", clip_sample=False))
        | trajectory("ddpm_v", ddpm(prediction_type="v_prediction"))
    )


def main():
    """Writes everything."""
    save("schedule", tables() | trajectories(), SCHEDULES)


if __name__ == "__main__":
    main()
