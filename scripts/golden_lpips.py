"""LPIPS by the package lpips on VGG16 and AlexNet with weights from seeds, in f64.

Writes tests/golden/lpips.safetensors. The header's `cases` has a case per line: `network` (`vgg` or `alex`), `images` (their
shape `[n, c, h, w]`), `side` (they are enlarged to it first; 0: not), and per network, under `weights`, the shape of every
tensor by its name in torchvision (`features.0.weight`) or lpips (`lin0.model.1.weight`). Neither weights nor images are stored:
both sides make them from seeds (`uniform` here and in `dmd_tests::seeded`). The tensors of a network, in the order of their
names, have seed 0 and the stream of their place: matrices `uniform·sqrt(6/fan_in)`, vectors `0.1·uniform`, linear weights
`0.5 + 0.5·uniform`. The images of case i have seed 1, streams 2i and 2i + 1.

`CASE.distances` `[n]`, and `CASE.gradient` of their mean with respect to the first images.
"""

import math

import lpips
import numpy as np
import torch
import torch.nn.functional as F
from golden_bases import uniform
from golden_common import save

CASES = {
    "vgg": {"network": "vgg", "images": [2, 3, 37, 40], "side": 0},
    "alex": {"network": "alex", "images": [2, 3, 71, 64], "side": 0},
    "grey": {"network": "alex", "images": [2, 1, 28, 28], "side": 224},
}


def seeded(kind):
    """The distance with weights from seeds, and their shapes by the names that torchvision and lpips give them."""
    network = lpips.LPIPS(net=kind, pretrained=False, pnet_rand=True, verbose=False).double().eval()
    named = {}
    for name, tensor in network.state_dict().items():
        parts = name.split(".")
        if name.startswith("net."):
            named[f"features.{parts[2]}.{parts[3]}"] = tensor
        elif name.startswith("lin") and not name.startswith("lins."):
            named[name] = tensor
    shapes = {}
    with torch.no_grad():
        for stream, name in enumerate(sorted(named)):
            shape = tuple(named[name].shape)
            u = uniform(0, stream, math.prod(shape))
            if name.startswith("lin"):
                value = 0.5 + 0.5 * u
            elif len(shape) == 1:
                value = 0.1 * u
            else:
                value = u * math.sqrt(6 / math.prod(shape[1:]))
            named[name].copy_(torch.from_numpy(value.astype(np.float32)).reshape(shape))
            shapes[name] = list(shape)
    return network, shapes


def main():
    """Writes everything."""
    tensors, weights = {}, {}
    networks = {}
    for kind in ("vgg", "alex"):
        networks[kind], weights[kind] = seeded(kind)
    for i, (case, about) in enumerate(CASES.items()):
        shape = about["images"]
        x, y = (
            torch.from_numpy(uniform(1, 2 * i + k, math.prod(shape)).astype(np.float32)).double().reshape(shape)
            for k in range(2)
        )
        x.requires_grad_(True)
        seen = (x, y)
        if about["side"]:
            seen = [F.interpolate(z, size=(about["side"],) * 2, mode="bilinear") for z in seen]
        distances = networks[about["network"]](*[z.expand(-1, 3, -1, -1) for z in seen]).flatten()
        (gradient,) = torch.autograd.grad(distances.mean(), x)
        print(case, distances.tolist(), gradient.abs().max().item())
        tensors |= {f"{case}.distances": distances, f"{case}.gradient": gradient}
    save("lpips", tensors, {"cases": CASES, "weights": weights})


if __name__ == "__main__":
    main()
