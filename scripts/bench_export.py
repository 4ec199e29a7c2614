"""Compares dmd-export with torch.onnx.export: nodes, file size, outputs and onnxruntime's latency of the same one-step
generators. Run through scripts/bench-export, which builds and installs what it needs.

Networks: the bundled generator, one of 3 million parameters and ddpm-cifar10, the latter two with weights from a seed.
PyTorch exports diffusers' UNet2DModel in a module with t fixed and the one-step arithmetic, by both of its exporters. What
counts is the better of the two in each figure, for latency with a symbolic batch like ours; files that both sides make for
one batch size only are timed beside them where dmd-export has --batch.

Latencies: one thread, all files in turn, the order reversed every round, sessions made afresh in every block; median of the
times per file. `cpu` figures are the same in processor time of that thread, which other programs disturb less.

Also what dmd-export needs for ddpm-cifar10, and how many numbers are in the files of ddpm-cifar10 and ddpm-celeba.
Ends with lines `figure NAME VALUE`; nodes, size and latency are ours over PyTorch's.
"""

import argparse
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import provenance

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHE = pathlib.Path(os.environ.get("DMD_CACHE", pathlib.Path.home() / ".cache/dmd"))
EXPORT = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", CACHE / "target")) / "release/dmd-export"
T_GEN = 440
BLOCKS = 3
LIMITS = {"nodes": 1.0, "size": 1.0, "difference": 1e-4, "latency": 0.95, "seconds": 10.0, "mib": 1000e6 / 2**20, "time": 0}
PARAMETERS = {"ddpm-cifar10": 32_856_707, "ddpm-celeba": 324_211}
# A program of its own, because a child's peak memory counts from the memory of the process that started it.
WATCH = """
import os, sys, time
start = time.perf_counter()
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
print(time.perf_counter() - start, usage.ru_maxrss / 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def write_checkpoint(folder, config, shapes, seed):
    """A generator with weights from a seed, as dmd-distill would leave it."""
    from golden_bases import seeded_weights
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    scheduler = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2, "num_train_timesteps": 1000}
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "generator.json").write_text(json.dumps({"t_gen": T_GEN, "input_scale": 1.0}))
    weights = {name: value.float().contiguous() for name, value in seeded_weights(shapes, seed).items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def checkpoint(name, scratch):
    """The folder of a network, made where it is not bundled."""
    from diffusers import UNet2DModel
    from golden_bases import CELEBA, CIFAR10, celeba_shapes

    if name == "small":
        return ROOT / "assets/one-step-fashion"
    if name == "ddpm-celeba":
        config = {**CELEBA, "channels": 16}
        return write_checkpoint(scratch / name, config, celeba_shapes(config), 3)
    config, seed = CIFAR10, 1
    if name == "3m":
        blocks = {"block_out_channels": [64, 64, 128], "layers_per_block": 1, "norm_num_groups": 8}
        blocks["down_block_types"] = ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"]
        blocks["up_block_types"] = ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"]
        config, seed = {**CIFAR10, **blocks}, 2
    shapes = {key: tuple(value.shape) for key, value in UNet2DModel.from_config(config).state_dict().items()}
    return write_checkpoint(scratch / name, config, shapes, seed)


def one_step(folder):
    """What a user of PyTorch would write to export the checkpoint, and its configuration."""
    import torch
    from diffusers import DDPMScheduler, UNet2DModel
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    generator = json.loads((folder / "generator.json").read_text())
    scheduler = DDPMScheduler.from_config(json.loads((folder / "scheduler_config.json").read_text()))
    unet = UNet2DModel.from_config(config)
    unet.load_state_dict(load_file(folder / "model.safetensors"))
    kept = float(scheduler.alphas_cumprod[generator["t_gen"]])

    class OneStep(torch.nn.Module):
        """x_gen = (z·s - sigma_t·eps_pred(z·s, t_gen)) / alpha_t."""

        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, z, label=None):
            """The image."""
            x = z if generator["input_scale"] == 1.0 else z * generator["input_scale"]
            eps_pred = self.unet(x, generator["t_gen"], class_labels=label).sample
            return (x - math.sqrt(1 - kept) * eps_pred) / math.sqrt(kept)

    return OneStep().eval(), config


def inputs(config, batch):
    """Noise, and classes where the network knows them, by the names of dmd-export's inputs."""
    import numpy

    shape = (batch, config["in_channels"], config["sample_size"], config["sample_size"])
    feed = {"z": numpy.random.default_rng(batch).standard_normal(shape, dtype=numpy.float32)}
    if config.get("num_class_embeds"):
        feed["class"] = numpy.arange(batch, dtype=numpy.int64) % 10
    return feed


def export_by_torch(module, config, path, dynamo, batch=None):
    """One file; with a symbolic batch where none is given."""
    import torch

    feed = {name: torch.from_numpy(value) for name, value in inputs(config, batch or 2).items()}
    options = {"input_names": list(feed), "output_names": ["x_gen"], "dynamo": dynamo}
    if dynamo:
        options |= {"external_data": False, "verbose": False}
        if batch is None:
            dim = torch.export.Dim("n", min=1, max=4096)
            options["dynamic_shapes"] = tuple({0: dim} for _ in feed)
    elif batch is None:
        options["dynamic_axes"] = {name: {0: "n"} for name in [*feed, "x_gen"]}
    with torch.inference_mode(False), torch.no_grad():
        torch.onnx.export(module, tuple(feed.values()), str(path), **options)


def watch(folder, path, *options):
    """Runs dmd-export; its summary, seconds and peak memory in MiB."""
    command = [sys.executable, "-S", "-c", WATCH, str(EXPORT), str(path), "--from", str(folder), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr or f"error: dmd-export ended with {done.returncode}")
    summary, _, last = done.stdout.rstrip().rpartition("\n")
    seconds, mib = map(float, last.split())
    return json.loads(summary) | {"seconds": seconds, "mib": mib}


def can_fix_batch():
    """Whether this dmd-export has --batch."""
    return "--batch" in subprocess.run([EXPORT, "--help"], capture_output=True, text=True, check=True).stdout


def session(path):
    """onnxruntime with one thread and all optimisations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])


def describe(path):
    """Nodes, those that onnxruntime is left with, bytes."""
    import onnx
    import onnxruntime

    graph = onnx.load(path).graph
    counts = {}
    for node in graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as scratch:
        options.optimized_model_filepath = str(pathlib.Path(scratch) / "optimised.onnx")
        onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        left = len(onnx.load(options.optimized_model_filepath).graph.node)
    return {"nodes": len(graph.node), "run": left, "bytes": path.stat().st_size, "operators": dict(sorted(counts.items()))}


def alternate(files, feed, seconds):
    """Seconds of every run by file, and the same in processor time."""
    times, busy = {name: [] for name in files}, {name: [] for name in files}
    for _ in range(BLOCKS):
        sessions = {name: session(path) for name, path in files.items()}
        runs = {name: lambda s=s: s.run(None, {i.name: feed[i.name] for i in s.get_inputs()}) for name, s in sessions.items()}
        start = time.perf_counter()
        for run in runs.values():
            run()
        rounds = int(seconds / BLOCKS / (time.perf_counter() - start))
        order = list(runs)
        for index in range(max(6, min(rounds, 200))):
            for name in order:
                start, start_busy = time.perf_counter(), time.thread_time()
                runs[name]()
                if index:
                    times[name].append(time.perf_counter() - start)
                    busy[name].append(time.thread_time() - start_busy)
            order.reverse()
    return times, busy


def check_parameters(name, scratch, folder):
    """Numbers in the file that come from the checkpoint, all others, and that nothing is left of the time path."""
    import onnx
    from safetensors import safe_open

    path = scratch / f"{name}-parameters.onnx"
    watch(folder, path)
    graph = onnx.load(path).graph
    with safe_open(folder / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    floats = {i.name: math.prod(i.dims) for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT}
    known = sum(count for key, count in floats.items() if key in keys)
    time_path = [key for key in floats if key in keys and "time" in key]
    moving = {i.name for i in graph.input}
    for node in graph.node:
        if not moving.intersection(node.input) or node.op_type in ("Sin", "Cos", "Gemm"):
            time_path.append(node.name)
        moving.update(node.output)
    print(f"{name}: {known} parameters in the file, {sum(floats.values()) - known} other numbers, time path: {time_path or 'none'}")
    return known, len(time_path)


def compare(name, scratch, options, about):
    """Exports and times one network; returns figures."""
    import numpy
    import torch

    folder = checkpoint(name, scratch)
    module, config = one_step(folder)
    print(f"{name}: {sum(p.numel() for p in module.parameters())} parameters", flush=True)
    files, exported = {"dmd": scratch / f"{name}.onnx"}, {}
    exported["dmd"] = watch(folder, files["dmd"])
    for exporter, dynamo in (("torchscript", False), ("dynamo", True)):
        path, start = scratch / f"{name}-{exporter}.onnx", time.perf_counter()
        try:
            export_by_torch(module, config, path, dynamo)
        except Exception as error:  # one exporter's failure leaves the other to compare with
            print(f"  {exporter}: failed, {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        files[exporter], exported[exporter] = path, {"seconds": time.perf_counter() - start}
    rivals = [who for who in files if who != "dmd"]
    if not rivals:
        sys.exit("error: neither of PyTorch's exporters works")
    rows = {who: describe(path) | {"export_seconds": exported[who]["seconds"]} for who, path in files.items()}
    feed = inputs(config, 16)
    with torch.no_grad():
        expected = module(*(torch.from_numpy(value) for value in feed.values())).numpy()
    for who, path in files.items():
        own = session(path)
        got = own.run(None, {i.name: feed[i.name] for i in own.get_inputs()})[0]
        rows[who]["difference"] = float(numpy.abs(got - expected).max())
        row = rows[who]
        print(
            f"  {who:11} {row['nodes']:4} nodes, {row['run']:4} when optimised, {row['bytes'] / 1e6:7.3f} MB, "
            f"within {row['difference']:.1e} of PyTorch, exported in {row['export_seconds']:.1f} s",
            flush=True,
        )
    figures = {
        f"nodes_{name}": rows["dmd"]["nodes"] / min(rows[who]["nodes"] for who in rivals),
        f"size_{name}": rows["dmd"]["bytes"] / min(rows[who]["bytes"] for who in rivals),
        f"difference_{name}": rows["dmd"]["difference"],
    }
    if name == "ddpm-cifar10":
        figures |= {f"seconds_{name}": exported["dmd"]["seconds"], f"mib_{name}": exported["dmd"]["mib"]}
        print(f"  dmd-export: {exported['dmd']['seconds']:.2f} s, peak memory {exported['dmd']['mib']:.0f} MiB")
    about["networks"][name] = {"files": rows, "times": {}}
    fixed = can_fix_batch()
    for batch in options.batches:
        feed = inputs(config, batch)
        timed = files | fix_batch(name, scratch, folder, module, config, batch, fixed)
        times, busy = alternate(timed, feed, options.seconds)
        medians = {who: statistics.median(seconds) for who, seconds in times.items()}
        cpu = {who: statistics.median(seconds) for who, seconds in busy.items()}
        for who, seconds in times.items():
            low, _, high = statistics.quantiles(seconds, n=4)
            print(
                f"  batch {batch:2} {who:17} median {medians[who] * 1000:9.2f} ms, quartiles {low * 1000:.2f} to "
                f"{high * 1000:.2f}, {len(seconds)} runs; processor time {cpu[who] * 1000:.2f} ms",
                flush=True,
            )
        about["networks"][name]["times"][batch] = {"wall": times, "cpu": busy}
        figures[f"latency_{name}_{batch}"] = medians["dmd"] / min(medians[who] for who in rivals)
        figures[f"cpu_{name}_{batch}"] = cpu["dmd"] / min(cpu[who] for who in rivals)
        best_fixed = [value for who, value in medians.items() if who.endswith(" fixed") and not who.startswith("dmd")]
        if fixed and best_fixed:
            figures[f"fixed_latency_{name}_{batch}"] = medians["dmd fixed"] / min(best_fixed)
    return figures


def fix_batch(name, scratch, folder, module, config, batch, ours):
    """Files for one batch size only."""
    files = {}
    if not ours:
        return files
    files["dmd fixed"] = scratch / f"{name}-{batch}.onnx"
    watch(folder, files["dmd fixed"], "--batch", str(batch))
    for exporter, dynamo in (("torchscript", False), ("dynamo", True)):
        path = scratch / f"{name}-{exporter}-{batch}.onnx"
        try:
            export_by_torch(module, config, path, dynamo, batch)
            files[f"{exporter} fixed"] = path
        except Exception as error:  # as above
            print(f"  {exporter}, batch {batch}: failed, {type(error).__name__}")
    return files


def judge(figures):
    """Prints the figures; those beyond what is wanted say so."""
    for name, value in figures.items():
        limit = LIMITS.get(name.split("_")[0], PARAMETERS.get(name.removeprefix("parameters_")))
        wanted = f"  # wanted: at most {limit:.4g}" if limit is not None and value > limit else ""
        print(f"figure {name} {value:.4g}{wanted}" if isinstance(value, float) else f"figure {name} {value}{wanted}")


def main():
    """Measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(number) for number in text.split(",")]
    parser.add_argument("--networks", default="small,3m,ddpm-cifar10", help="some of small,3m,ddpm-cifar10 [default: all]")
    parser.add_argument("--batches", type=numbers, default=[1, 16], help="batch sizes that are timed [default: 1,16]")
    parser.add_argument("--seconds", type=float, default=60, help="per network and batch [default: 60]")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="file for the raw times")
    parser.add_argument("--keep", type=pathlib.Path, metavar="DIR", help="folder for the exported files")
    options = parser.parse_args()
    if not EXPORT.is_file():
        sys.exit(f"error: there is no {EXPORT}\n\nhint: run scripts/bench-export")
    import diffusers
    import onnxruntime
    import torch

    torch.set_num_threads(1)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "onnxruntime": onnxruntime.__version__}
    about = provenance.about("bench-export", **versions) | {"networks": {}}
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        for name in options.networks.split(","):
            figures |= compare(name, scratch, options, about)
        for name in PARAMETERS:
            folder = scratch / name if (scratch / name).is_dir() else checkpoint(name, scratch)
            figures[f"parameters_{name}"], figures[f"time_path_{name}"] = check_parameters(name, scratch, folder)
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            for path in scratch.glob("*.onnx"):
                shutil.copy(path, options.keep)
    about["figures"] = figures
    if options.json:
        options.json.write_text(json.dumps(about, indent=1) + "\n")
    judge(figures)


if __name__ == "__main__":
    main()
