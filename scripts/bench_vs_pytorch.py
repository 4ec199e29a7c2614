"""Times training steps and forward passes of this project and of PyTorch on the CPU, alternating, on the same networks,
weights and batch. Run through scripts/bench-vs-pytorch, which builds and installs what it needs.

Networks: the bundled base, and one of 1.6 million parameters with random weights. PyTorch runs diffusers' UNet2DModel in
its default memory layout and in channels_last. A training step is forward, mean squared error, backward and AdamW.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import diffusers
import provenance
import torch
from safetensors.torch import load_file, save_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
BATCH = 64
MEDIUM = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [48, 96],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": None,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}


def worker(folder, batch_file, layout):
    """The PyTorch side: the same protocol as distill/benches/steps.rs."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    folder = pathlib.Path(folder)
    model = diffusers.UNet2DModel.from_config(json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(next(folder.glob("*.safetensors"))))
    batch = load_file(batch_file)
    x_t, eps = batch["x_t"], batch["eps"]
    if layout == "channels_last":
        model, x_t = model.to(memory_format=torch.channels_last), x_t.to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    arguments = {"class_labels": batch["class"]} if "class" in batch else {}
    for line in sys.stdin:
        start = time.perf_counter()
        if line.strip() == "train":
            optimiser.zero_grad(set_to_none=True)
            value = torch.nn.functional.mse_loss(model(x_t, batch["t"], **arguments).sample, eps)
            value.backward()
            optimiser.step()
        else:
            with torch.inference_mode():
                value = model(x_t, batch["t"], **arguments).sample.mean()
        seconds = time.perf_counter() - start
        print(seconds, float(value.detach()), flush=True)


class Contestant:
    """A process that runs one step at a time and sleeps in between."""

    def __init__(self, command, threads):
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
        settings = {**os.environ, **{name: str(threads) for name in names}}
        settings["CANDLE_NUM_THREADS"] = "1"
        self.process = subprocess.Popen(
            command, env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def run(self, what):
        """Seconds and value of one step."""
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        seconds, value = self.process.stdout.readline().split()
        return float(seconds), float(value)

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


def batch_for(config, path):
    """A batch of noisy images, the same for all."""
    numbers = torch.Generator().manual_seed(1)
    shape = (BATCH, config["in_channels"], config["sample_size"], config["sample_size"])
    tensors = {
        "x_t": torch.randn(shape, generator=numbers),
        "eps": torch.randn(shape, generator=numbers),
        "t": torch.randint(0, 1000, (BATCH,), generator=numbers),
    }
    if config.get("num_class_embeds"):
        tensors["class"] = torch.randint(0, 10, (BATCH,), generator=numbers)
    save_file(tensors, path)


def compare(name, folder, steps_binary, threads, rounds, out):
    """Times one network; returns medians by contestant and kind of step."""
    with tempfile.TemporaryDirectory() as scratch:
        batch = pathlib.Path(scratch) / "batch.safetensors"
        batch_for(json.loads((folder / "config.json").read_text()), batch)
        python = [sys.executable, __file__, "--worker", str(folder), str(batch)]
        contestants = {
            "dmd": Contestant([steps_binary, str(folder), str(batch)], threads),
            "torch": Contestant([*python, "default"], threads),
            "torch channels_last": Contestant([*python, "channels_last"], threads),
        }
        times = {(who, kind): [] for who in contestants for kind in ("train", "forward")}
        for index in range(rounds + 2):
            for kind in ("train", "forward"):
                values = {}
                for who, contestant in contestants.items():
                    seconds, values[who] = contestant.run(kind)
                    if index >= 2:
                        times[who, kind].append(seconds)
                if kind == "train" and index < 5:
                    spread = max(values.values()) - min(values.values())
                    assert spread < 1e-3 * max(values.values()), f"the losses differ: {values}"
        for contestant in contestants.values():
            contestant.stop()
    medians = {}
    for (who, kind), seconds in times.items():
        quarters = statistics.quantiles(seconds, n=4)
        medians[who, kind] = quarters[1]
        print(
            f"{name:8} {threads} threads  {kind:8} {who:20} median {quarters[1] * 1000:8.1f} ms, "
            f"quartiles {quarters[0] * 1000:.1f} to {quarters[2] * 1000:.1f}"
        )
        out.append({"network": name, "threads": threads, "step": kind, "who": who, "seconds": seconds})
    return medians


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each kind [default: 15]")
    parser.add_argument("--threads", default="1,2", help="numbers of threads [default: 1,2]")
    parser.add_argument("--json", type=pathlib.Path, help="file for the raw times")
    parser.add_argument("--steps", help="the built bench `steps`")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(*options.worker)
    raw, figures, medians = [], {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        medium = pathlib.Path(scratch) / "medium"
        model = diffusers.UNet2DModel(**MEDIUM)
        model.save_pretrained(medium)
        print(f"medium: {sum(p.numel() for p in model.parameters())} parameters")
        (medium / "scheduler").mkdir()
        diffusers.DDPMScheduler().save_pretrained(medium / "scheduler")
        for threads in (int(count) for count in options.threads.split(",")):
            for name, folder in (("bundled", ROOT / "assets/ddpm-fashion"), ("medium", medium)):
                m = compare(name, folder, options.steps, threads, options.rounds, raw)
                for step in ("train", "forward"):
                    torch_best = min(m["torch", step], m["torch channels_last", step])
                    medians[f"{name}_{step}_{threads}t"] = {"dmd": m["dmd", step], "torch_best": torch_best}
                best = min(m["torch", "train"], m["torch channels_last", "train"])
                if name == "bundled":
                    figures[f"train_step_vs_torch_{threads}t"] = m["dmd", "train"] / best
                    forward = min(m["torch", "forward"], m["torch channels_last", "forward"])
                    figures[f"forward_vs_torch_{threads}t"] = m["dmd", "forward"] / forward
                else:
                    figures[f"train_step_1m5_vs_torch_{threads}t"] = m["dmd", "train"] / m["torch", "train"]
                    figures[f"train_step_1m5_vs_torch_best_{threads}t"] = m["dmd", "train"] / best
                    figures[f"forward_1m5_vs_torch_{threads}t"] = m["dmd", "forward"] / m["torch", "forward"]
    if options.json:
        about = provenance.about("bench-vs-pytorch", sys.argv[3:], torch=torch.__version__, diffusers=diffusers.__version__)
        about |= {"batch": BATCH, "figures": figures, "medians": medians, "times": raw}
        options.json.write_text(json.dumps(about, indent=1) + "\n")
    for name, value in figures.items():
        print(f"figure {name} {value:.3f}")


if __name__ == "__main__":
    main()
