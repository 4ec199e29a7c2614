"""The features of pytorch-fid's Inception-v3 with weights from a seed, in f64.

Writes tests/golden/inception.safetensors: `CASE.features` `[n, 2048]`. Neither weights nor images are stored: both sides make
them from seeds (`uniform` here and in `dmd_tests::seeded`). The header's `cases` says the shape of each case's images
`[n, 3, h, w]` in [0, 1], `0.5 + 0.5·uniform`, seed 1, stream = place of the case; the weights have seed 0, the stream of a
tensor is its place in the order of the names of all convolutions and normalisations.
"""

import math

import numpy as np
import torch
from golden_bases import uniform
from golden_common import save
from pytorch_fid import inception

CASES = {"small": [2, 3, 32, 32], "uneven": [1, 3, 20, 45], "large": [1, 3, 310, 305]}


def seeded(network):
    """Fills every convolution and normalisation; the layer of classes is not used."""
    state = network.state_dict()
    names = sorted(name for name in state if not name.startswith("fc.") and not name.endswith("num_batches_tracked"))
    with torch.no_grad():
        for stream, name in enumerate(names):
            shape = tuple(state[name].shape)
            u = uniform(0, stream, math.prod(shape))
            if name.endswith("running_var"):
                value = 1 + 0.5 * u
            elif len(shape) == 1:
                value = 1 + 0.1 * u if name.endswith("weight") else 0.1 * u
            else:
                value = u * math.sqrt(6 / math.prod(shape[1:]))
            state[name].copy_(torch.from_numpy(value.astype(np.float32)).reshape(shape))


def main():
    """Writes everything."""
    inception.load_state_dict_from_url = lambda *_, **__: None
    load = torch.nn.Module.load_state_dict
    torch.nn.Module.load_state_dict = lambda network, _: seeded(network)
    network = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).double().eval()
    torch.nn.Module.load_state_dict = load
    tensors = {}
    for stream, (case, shape) in enumerate(CASES.items()):
        u = uniform(1, stream, math.prod(shape)).astype(np.float32)
        images = torch.from_numpy(np.float32(0.5) + np.float32(0.5) * u).double().reshape(shape)
        with torch.no_grad():
            features = network(images)[0].flatten(1)
        print(case, features.shape, features.mean().item(), features.std().item())
        tensors[f"{case}.features"] = features
    save("inception", tensors, CASES)


if __name__ == "__main__":
    main()
