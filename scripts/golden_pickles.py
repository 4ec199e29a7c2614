"""Small PyTorch checkpoints as other programs save them, for the loader's tests.

Writes tests/fixtures/pickles: `mnist.pth`, a state dict as Conditional_Diffusion_MNIST saves it (prefix `nn_model.`, the
sampler's tables, counters); `celeba.pt`, weights under the key `model` of a training program's checkpoint with the prefix `network.`;
both f16, from the seeds of golden_bases.py. `code.pth` would run a command if anybody executed it.
"""

import io
import pickle
import zipfile

import torch
from golden_bases import CELEBA, CONTEXT, celeba_shapes, context_shapes, seeded_weights
from golden_common import FIXTURES


class Code:
    """What a hostile pickle looks like."""

    def __reduce__(self):
        import os

        return os.system, ("touch executed-by-a-pickle",)


def main():
    """Writes the three files."""
    folder = FIXTURES / "pickles"
    folder.mkdir(exist_ok=True)
    shapes = context_shapes({**CONTEXT, "n_feat": 8, "sample_size": 12})
    state = {f"nn_model.{name}": value.half() for name, value in seeded_weights(shapes, 21).items()}
    for name in list(state):
        if name.endswith("running_var"):
            state[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    steps = CONTEXT["n_steps"]
    beta = (0.02 - 1e-4) * torch.arange(0, steps + 1, dtype=torch.float32) / steps + 1e-4
    state["alphabar_t"] = torch.cumsum(torch.log(1 - beta), 0).exp()
    state["sqrt_beta_t"] = beta.sqrt()
    torch.save(state, folder / "mnist.pth")
    shapes = celeba_shapes({**CELEBA, "channels": 8, "n_steps": 50})
    state = {f"network.{name}": value.half() for name, value in seeded_weights(shapes, 22).items()}
    torch.save({"epoch": 3, "model": state}, folder / "celeba.pt")
    data = io.BytesIO()
    pickle.dump({"init_conv.conv1.0.weight": Code()}, data, protocol=2)
    with zipfile.ZipFile(folder / "code.pth", "w", zipfile.ZIP_STORED) as archive:
        for name, content in (("data.pkl", data.getvalue()), ("version", "3\n")):
            archive.writestr(zipfile.ZipInfo(f"code/{name}"), content)  # without the time of day
    for path in sorted(folder.iterdir()):
        print(f"  {path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
