"""The adversarial losses of DMD2 with all gradients, and the discriminator on a larger bottleneck.

Writes tests/golden/adversarial.safetensors. Networks, schedule and the other losses are those of golden_losses.py (weights
`fake.NAME` and `generator.NAME` in losses.safetensors). The discriminator looks at what the critic's middle block makes of a
noisy image: 4x4 convolutions with stride 2 and padding 1 while it is more than 4 pixels wide, one over all that is left, GroupNorm
and SiLU after each, then a 1x1 convolution to the logit D. Its weights are `fake.discriminator.NAME`.

 1. generator loss = loss.dm + 0.5·loss.adversarial, with loss.adversarial = mean(softplus(-D(x_t))) of
    x_t = alpha_t·x_gen + sigma_t·eps at `t_adversarial`, `eps_adversarial`; gradients `grad.generator.NAME`.
 2. critic loss = loss.critic + 0.25·loss.discrimination, with loss.discrimination =
    mean(softplus(D(x_t) of the generated)) + mean(softplus(-D(x_t) of the real `y_real`, `class_real`)), both noisy by
    `t_real`, `eps_real` (generated first); gradients `grad.fake.NAME`, those of the discriminator among them.
 3. `ddpm.logit` and `ddpm.gradient` of its mean with respect to `ddpm.x_t`, at `ddpm.t`, for the tiny-ddpm fixture, whose
    bottleneck is 8 pixels wide; weights `ddpm.discriminator.NAME`.

Yin et al. 2024 (arXiv:2405.14867), Eq. 4 and section 4.3.
"""

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from golden_common import FIXTURES, Numbers, alpha_sigma, save
from golden_losses import BATCH, critic_loss, draw, generator_losses, load_networks

GAN_WEIGHT = 0.5
GAN_WEIGHT_FAKE = 0.25


class Discriminator(torch.nn.Module):
    """The head, with random weights."""

    def __init__(self, channels, side, groups, seed):
        super().__init__()
        layer = 0
        while side > 4:
            self.add(layer, torch.nn.Conv2d(channels, channels, 4, 2, 1), channels, groups)
            side, layer = side // 2, layer + 1
        self.add(layer, torch.nn.Conv2d(channels, channels, side), channels, groups)
        self.layers = layer + 1
        self.logit = torch.nn.Conv2d(channels, 1, 1)
        numbers = Numbers(seed)
        with torch.no_grad():
            for name, parameter in sorted(self.named_parameters()):
                noise = numbers.normal(*parameter.shape).float()
                if parameter.ndim > 1:
                    parameter.copy_(noise * parameter[0].numel() ** -0.5)
                else:
                    parameter.copy_((1 if name.startswith("norm") and name.endswith("weight") else 0) + 0.2 * noise)
        self.double()

    def add(self, layer, conv, channels, groups):
        """A convolution and its normalisation."""
        setattr(self, f"conv{layer}", conv)
        setattr(self, f"norm{layer}", torch.nn.GroupNorm(groups, channels, eps=1e-5))

    def forward(self, x):
        """Logits `[n]`."""
        for layer in range(self.layers):
            x = F.silu(getattr(self, f"norm{layer}")(getattr(self, f"conv{layer}")(x)))
        return self.logit(x).flatten()


def bottleneck(network, x_t, t, labels):
    """What the middle block makes of a noisy image."""
    kept = []
    hook = network.mid_block.register_forward_hook(lambda module, inputs, output: kept.append(output))
    network(x_t, t.float(), labels)
    hook.remove()
    return kept[0]


def main():
    """Writes everything."""
    networks = load_networks()
    head = Discriminator(16, 3, 4, 71)
    numbers = Numbers(70)
    data = draw(numbers) | {
        "t_adversarial": numbers.integers(0, 1000, BATCH),
        "eps_adversarial": numbers.normal(BATCH, 1, 12, 12),
        "y_real": torch.tanh(numbers.normal(BATCH, 1, 12, 12)).float().double(),
        "class_real": numbers.integers(0, 10, BATCH),
        "t_real": numbers.integers(0, 1000, 2 * BATCH),
        "eps_real": numbers.normal(2 * BATCH, 1, 12, 12),
    }

    def logits(x, t, eps, labels):
        alpha, sigma = alpha_sigma(t)
        return head(bottleneck(networks["fake"], alpha * x + sigma * eps, t, labels))

    tensors = {f"fake.discriminator.{key}": value.detach().clone() for key, value in head.named_parameters()}
    dm, _, images = generator_losses(networks, data)
    x_gen = images["x_gen"]
    judged = logits(x_gen, data["t_adversarial"], data["eps_adversarial"], data["class"])
    adversarial = F.softplus(-judged).mean()
    generator = dict(networks["generator"].named_parameters())
    for key, grad in zip(
        generator, torch.autograd.grad(dm + GAN_WEIGHT * adversarial, list(generator.values())), strict=True
    ):
        tensors[f"grad.generator.{key}"] = grad

    critic = critic_loss(networks, data, x_gen)
    both = torch.cat([x_gen.detach(), data["y_real"]])
    labels = torch.cat([data["class"], data["class_real"]])
    judged = logits(both, data["t_real"], data["eps_real"], labels)
    discrimination = F.softplus(judged[:BATCH]).mean() + F.softplus(-judged[BATCH:]).mean()
    trained = dict(networks["fake"].named_parameters())
    trained |= {f"discriminator.{key}": value for key, value in head.named_parameters()}
    for key, grad in zip(
        trained, torch.autograd.grad(critic + GAN_WEIGHT_FAKE * discrimination, list(trained.values())), strict=True
    ):
        tensors[f"grad.fake.{key}"] = grad
    losses = {"dm": dm, "adversarial": adversarial, "critic": critic, "discrimination": discrimination}
    print({key: value.item() for key, value in losses.items()})
    tensors |= {f"once.{key}": value for key, value in data.items()}
    tensors |= {f"once.loss.{key}": value.reshape(1) for key, value in losses.items()}

    network = UNet2DModel.from_pretrained(FIXTURES / "tiny-ddpm", low_cpu_mem_usage=False).double().eval()
    head = Discriminator(16, 8, 4, 72)
    x_t, t = numbers.normal(2, 3, 16, 16).requires_grad_(True), torch.tensor([10, 700])
    logit = head(bottleneck(network, x_t, t, None))
    (gradient,) = torch.autograd.grad(logit.mean(), x_t)
    tensors |= {f"ddpm.discriminator.{key}": value.detach().clone() for key, value in head.named_parameters()}
    tensors |= {"ddpm.x_t": x_t, "ddpm.t": t, "ddpm.logit": logit, "ddpm.gradient": gradient}
    save("adversarial", tensors)


if __name__ == "__main__":
    main()
