"""The three losses of distribution matching distillation, their gradients, and ten training steps.

Writes tests/golden/losses.safetensors. Networks: `teacher` is the tiny-class fixture (frozen); `fake` and `generator`
are perturbed copies, stored as `fake.NAME` and `generator.NAME`. Schedule: the fixture's, in f64. t_gen 440, input
scale 1. Names below are tensor names in the file (`once.` for the first part, `steps.` stacked over ten steps for the
second). All random values are stored; nothing has to be drawn again.

Order of operations of one step (Yin et al. 2024, arXiv:2311.18828):
 1. x_gen = (z - sigma·eps_G(z, t_gen, class)) / alpha, at t_gen, with gradient.
 2. without gradient: x_t = alpha_t·x_gen + sigma_t·eps, at `t`;
    x0_real = (x_t - sigma_t·eps_teacher(x_t, t, class)) / alpha_t, x0_fake likewise with the fake network.
 3. dm_gradient = (x0_fake - x0_real) / max(mean|x_gen - x0_real|, 1e-5), the mean per image over c, h, w.
 4. loss.dm = 0.5·mean((x_gen - stopgrad(x_gen - dm_gradient))²), over b, c, h, w.
 5. loss.reg = mean((G(z_ref, class_ref) - y_ref)²).
 6. generator loss = loss.dm + 0.5·loss.reg; gradients `grad.generator.NAME`.
 7. (ten steps only) gradients clipped to global L2 norm 10: factor min(1, 10 / (norm + 1e-6)); then AdamW: lr 1e-3,
    betas 0.9 and 0.999, eps 1e-8, weight decay 0.01: p = p·(1 - lr·wd), then p -= lr·m_hat / (sqrt(v_hat) + eps).
 8. critic, on the x_gen of line 1, detached (made before the generator's update), at `t_fake`:
    x_t = alpha_t·x_gen + sigma_t·eps_fake; loss.critic = mean((eps_of_fake(x_t, t_fake, class) - eps_fake)²);
    gradients `grad.fake.NAME`.
 9. (ten steps only) the critic's update as in 7, with its own optimiser.
In the ten steps `steps.grad_norm.generator` and `steps.grad_norm.fake` are the norms before clipping, which acts on
the generator in the first steps. Final weights: `final.generator.NAME`, `final.fake.NAME`.

A gradient that is 0 in exact arithmetic is rounding noise in any implementation, and AdamW turns noise into steps of
up to lr: the bias of `to_k` (softmax does not see it) is the only such parameter here. It has no effect on any output.
"""

import torch
from diffusers import UNet2DModel
from golden_common import FIXTURES, T_GEN, Numbers, alpha_sigma, perturbed, save

BATCH = 3
STEPS = 10
LR = 1e-3
LAMBDA_REG = 0.5


def generate(network, z, labels):
    """Line 1."""
    alpha, sigma = alpha_sigma(torch.tensor([T_GEN]), z.dtype)
    t = torch.tensor(float(T_GEN))
    return (z - sigma * network(z, t, labels).sample) / alpha


def x0_pred(network, x_t, t, labels):
    """The image that a network's noise prediction implies."""
    alpha, sigma = alpha_sigma(t, x_t.dtype)
    return (x_t - sigma * network(x_t, t.float(), labels).sample) / alpha


def generator_losses(networks, data):
    """Lines 1 to 5."""
    x_gen = generate(networks["generator"], data["z"], data["class"])
    with torch.no_grad():
        alpha, sigma = alpha_sigma(data["t"], x_gen.dtype)
        x_t = alpha * x_gen + sigma * data["eps"]
        x0_real = x0_pred(networks["teacher"], x_t, data["t"], data["class"])
        x0_fake = x0_pred(networks["fake"], x_t, data["t"], data["class"])
        scale = (x_gen - x0_real).abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-5)
        dm_gradient = (x0_fake - x0_real) / scale
    dm = 0.5 * (x_gen - (x_gen - dm_gradient).detach()).square().mean()
    reg = (generate(networks["generator"], data["z_ref"], data["class_ref"]) - data["y_ref"]).square().mean()
    images = {"x_gen": x_gen, "x0_real": x0_real, "x0_fake": x0_fake, "dm_gradient": dm_gradient}
    return dm, reg, images


def critic_loss(networks, data, x_gen):
    """Line 8."""
    alpha, sigma = alpha_sigma(data["t_fake"], x_gen.dtype)
    x_t = alpha * x_gen.detach() + sigma * data["eps_fake"]
    eps_pred = networks["fake"](x_t, data["t_fake"].float(), data["class"]).sample
    return (eps_pred - data["eps_fake"]).square().mean()


def draw(numbers):
    """The random part of one step."""
    image = (BATCH, 1, 12, 12)
    return {
        "z": numbers.normal(*image),
        "class": numbers.integers(0, 10, BATCH),
        "t": numbers.integers(20, 981, BATCH),
        "eps": numbers.normal(*image),
        "z_ref": numbers.normal(*image),
        "class_ref": numbers.integers(0, 10, BATCH),
        "y_ref": torch.tanh(numbers.normal(*image)).float().double(),
        "t_fake": numbers.integers(0, 1000, BATCH),
        "eps_fake": numbers.normal(*image),
    }


def load_networks(single=False):
    """Teacher, critic and generator, in f64 or f32."""
    teacher = UNet2DModel.from_pretrained(FIXTURES / "tiny-class", low_cpu_mem_usage=False).eval()
    networks = {
        "teacher": teacher,
        "fake": perturbed(teacher, 51, 0.1),
        "generator": perturbed(teacher, 52, 0.1),
    }
    return {name: network.float() if single else network.double() for name, network in networks.items()}


def once(networks):
    """One evaluation of every loss, with all gradients."""
    data = draw(Numbers(50))
    dm, reg, images = generator_losses(networks, data)
    critic = critic_loss(networks, data, images["x_gen"])
    (dm + LAMBDA_REG * reg).backward()
    critic.backward()
    tensors = {f"once.{key}": value for key, value in (data | images).items()}
    for key, loss in (("dm", dm), ("reg", reg), ("critic", critic)):
        tensors[f"once.loss.{key}"] = loss.reshape(1)
    for role in ("generator", "fake"):
        for key, parameter in networks[role].named_parameters():
            tensors[f"{role}.{key}"] = parameter.detach().clone()
            tensors[f"grad.{role}.{key}"] = parameter.grad
    return tensors


def ten_steps(networks):
    """Alternating updates of generator and critic."""
    numbers = Numbers(60)
    optimisers = {
        role: torch.optim.AdamW(
            networks[role].parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, foreach=False
        )
        for role in ("generator", "fake")
    }
    rows = []

    def update(role, loss):
        optimisers[role].zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(networks[role].parameters(), 10.0, foreach=False)
        optimisers[role].step()
        return norm

    dtype = next(networks["teacher"].parameters()).dtype
    for _ in range(STEPS):
        drawn = draw(numbers)
        data = {key: value.to(dtype) if value.is_floating_point() else value for key, value in drawn.items()}
        dm, reg, images = generator_losses(networks, data)
        row = dict(drawn)
        row["grad_norm.generator"] = update("generator", dm + LAMBDA_REG * reg)
        critic = critic_loss(networks, data, images["x_gen"])
        row["grad_norm.fake"] = update("fake", critic)
        rows.append(row | {"loss.dm": dm, "loss.reg": reg, "loss.critic": critic})
    tensors = {f"steps.{key}": torch.stack([row[key].detach() for row in rows]) for key in rows[0]}
    for role in ("generator", "fake"):
        for key, parameter in networks[role].named_parameters():
            tensors[f"final.{role}.{key}"] = parameter
    return tensors


def report(tensors):
    """Prints what the steps did, and how far torch's own f32 strays from the f64 reference."""
    for key in ("loss.dm", "loss.reg", "loss.critic", "grad_norm.generator", "grad_norm.fake"):
        print(f"  {key}: " + " ".join(f"{value:.4g}" for value in tensors[f"steps.{key}"].tolist()))
    single = ten_steps(load_networks(single=True))
    for key in ("loss.dm", "loss.reg", "loss.critic"):
        error = (single[f"steps.{key}"].double() / tensors[f"steps.{key}"] - 1).abs().max().item()
        print(f"  {key}: f32 differs by {error:.1e} relative")
    for kind in ("final.generator", "final.fake"):
        worst = {
            key: (single[key].double() - tensors[key]).abs().max().item() for key in tensors if key.startswith(kind)
        }
        seen = max(error for key, error in worst.items() if not key.endswith("to_k.bias"))
        unseen = max(error for key, error in worst.items() if key.endswith("to_k.bias"))
        print(f"  {kind}: f32 differs by {seen:.1e}, in to_k.bias by {unseen:.1e}")


def main():
    """Writes everything."""
    tensors = once(load_networks()) | ten_steps(load_networks())
    settings = {
        "t_gen": T_GEN,
        "input_scale": 1.0,
        "lr": LR,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.01,
        "clip": 10.0,
        "lambda_reg": LAMBDA_REG,
        "steps": STEPS,
    }
    save("losses", tensors, settings)
    report(tensors)


if __name__ == "__main__":
    main()
