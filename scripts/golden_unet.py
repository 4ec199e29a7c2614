"""Fixtures tiny-ddpm and tiny-class, and what diffusers' UNet2DModel computes with them.

Writes tests/fixtures/{tiny-ddpm,tiny-class}/ and tests/golden/{unet_tiny_ddpm,unet_tiny_class,one_step}.safetensors.
"""

import math

import torch
from diffusers import UNet2DModel
from golden_common import (
    FIXTURES,
    T_GEN,
    Numbers,
    alpha_sigma,
    ddpm_scheduler,
    save,
    tiny_class,
    tiny_ddpm,
)


def write_fixture(name, model):
    """Writes a checkpoint directory in diffusers' layout and reads it back in f64."""
    folder = FIXTURES / name
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, safe_serialization=True)
    ddpm_scheduler().save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    return UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False).double().eval()


def forward_and_gradients(name, model, seed, timesteps, classes):
    """eps_pred for a batch of different timesteps, and d mean(eps_pred·cotangent) / d everything."""
    numbers = Numbers(seed)
    side, channels, batch = model.config.sample_size, model.config.in_channels, len(timesteps)
    x_t = numbers.normal(batch, channels, side, side).requires_grad_()
    cotangent = numbers.normal(batch, channels, side, side)
    t = torch.tensor(timesteps, dtype=torch.float32)
    labels = None if classes is None else torch.tensor(classes)
    eps_pred = model(x_t, t, labels).sample
    (eps_pred * cotangent).mean().backward()
    tensors = {"x_t": x_t, "timesteps": t, "eps_pred": eps_pred, "cotangent": cotangent, "grad.x_t": x_t.grad}
    if labels is not None:
        tensors["class"] = labels
    for key, parameter in model.named_parameters():
        tensors[f"grad.{key}"] = parameter.grad
    save(name, tensors)
    print(f"  eps_pred: standard deviation {eps_pred.std():.3f}; parameters: {model.num_parameters()}")


def one_step(model):
    """x_gen = (z - sigma_t·eps_pred(z, t_gen)) / alpha_t at t_gen, input scale 1."""
    numbers = Numbers(30)
    z = numbers.normal(4, 1, 12, 12)
    labels = torch.tensor([0, 3, 9, 10])
    with torch.no_grad():
        eps_pred = model(z, torch.tensor(float(T_GEN)), labels).sample
    alpha, sigma = alpha_sigma(torch.tensor([T_GEN]))
    assert math.isclose(alpha.item(), 0.371093, abs_tol=1e-6)
    tensors = {
        "z": z,
        "class": labels,
        "eps_pred": eps_pred,
        "x_gen": (z - sigma * eps_pred) / alpha,
        "alpha_t.f64": alpha.reshape(1),
        "sigma_t.f64": sigma.reshape(1),
    }
    save("one_step", tensors, {"t_gen": T_GEN, "input_scale": 1.0})


def main():
    """Writes everything."""
    plain = write_fixture("tiny-ddpm", tiny_ddpm())
    forward_and_gradients("unet_tiny_ddpm", plain, 10, [0.0, 999.0, 437.0], None)
    conditional = write_fixture("tiny-class", tiny_class())
    forward_and_gradients("unet_tiny_class", conditional, 20, [999.0, 0.0, 437.0], [3, 10, 0])
    one_step(conditional)


if __name__ == "__main__":
    main()
