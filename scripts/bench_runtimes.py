"""Compares dmd-run with Python onnxruntime and PyTorch on the same one-step generators. Run through scripts/bench-runtimes,
which builds and installs what it needs.

Rows: `engine`, `tract` and `ort` are dmd-run's engines on dmd-export's file; `pyort` is Python onnxruntime on PyTorch's export of the
same network (torch.onnx.export of diffusers' UNet2DModel with t fixed, no further optimisation), `pyort_ours` on dmd-export's
file; `eager` and `compile` are PyTorch itself. dmd-run waits in processes of its own and evaluates on request, so that all rows
take turns in every round, whose order is reversed each time; the library of onnxruntime is the same for all.

Times are wall times of one evaluation, medians; `cpu` is the processor time of the process, which other programs disturb less but
which counts threads that wait for work. Then whole processes of dmd-run, from their start to a picture of the bundled model on disk.
Ends with lines `figure NAME VALUE`: `A_vs_B_bN_Tt_NETWORK` is A's time over B's.
"""

import argparse
import glob
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import provenance
from bench_export import ROOT, checkpoint, export_by_torch, inputs, one_step

CACHE = pathlib.Path(os.environ.get("DMD_CACHE", pathlib.Path.home() / ".cache/dmd"))
PROGRAMS = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", CACHE / "target")) / "release"
NETWORKS = {"bundled": "small", "3m": "3m", "ddpm-cifar10": "ddpm-cifar10"}
LEAST_ROUNDS = 7
MOST_ROUNDS = 300
WARM_UP = 3
STARTS = 15
PAIRS = [
    *[("ort", other) for other in ("pyort", "pyort_ours", "eager", "compile")],
    *[("engine", other) for other in ("ort", "pyort", "eager", "compile")],
    ("tract", "ort"),
]
LIMITS = {("ort", "pyort", 1): 1.0, ("ort", "pyort", 16): 1.0} | {
    (embedded, "ort", batch): limit for embedded in ("engine", "tract") for batch, limit in ((1, 2.0), (16, 2.2))
}
START_LIMITS = {"engine": 150, "tract": 150, "ort": 250}
PROVIDERS = {"engine": "engine", "ort": "cpu", "tract": "tract"}


class Waiting:
    """dmd-run in a process of its own that evaluates once per request."""

    def __init__(self, provider, path, threads, batch):
        command = [PROGRAMS / "dmd-run", "bench", path, "--on-request", "--provider", provider, "--threads", str(threads), "--batch", str(batch)]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.clock = (~self.child.pid << 3) | 2  # the processor time clock of that process, as clock_getcpuclockid makes it

    def __call__(self):
        before = time.clock_gettime(self.clock)
        try:
            self.child.stdin.write("\n")
            self.child.stdin.flush()
            seconds = float(self.child.stdout.readline()) / 1000
        except (OSError, ValueError):
            sys.exit(f"error: dmd-run stopped: {self.child.stderr.read()}")
        return seconds, time.clock_gettime(self.clock) - before

    def close(self):
        """Ends the process."""
        self.child.stdin.close()
        self.child.wait()


class Here:
    """A function of this process."""

    def __init__(self, function):
        self.function = function

    def __call__(self):
        start, busy = time.perf_counter(), time.process_time()
        self.function()
        return time.perf_counter() - start, time.process_time() - busy

    def close(self):
        """Nothing to end."""


def session(path, threads, feed):
    """Python onnxruntime with all optimisations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    made = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    feed = {port.name: feed[port.name] for port in made.get_inputs()}
    return Here(lambda: made.run(None, feed))


def torch_runs(module, feed, compiled):
    """PyTorch eager, and compiled where that works here."""
    import torch

    values = [torch.from_numpy(value) for value in feed.values()]

    def run(function):
        with torch.inference_mode():
            function(*values)

    runs = {"eager": Here(lambda: run(module))}
    if compiled:
        try:
            torch._dynamo.reset()
            fast = torch.compile(module, dynamic=False)
            run(fast)
            runs["compile"] = Here(lambda: run(fast))
        except Exception as error:  # a missing compiler, for example; the other rows stay
            print(f"  compile: failed, {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
    return runs


def alternate(runs, seconds, pause):
    """Wall and processor seconds of every evaluation, by row."""
    for _ in range(WARM_UP):
        for run in runs.values():
            run()
    times = {name: [] for name in runs}
    order, start = list(runs), time.perf_counter()
    for index in range(MOST_ROUNDS):
        if index >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name in order:
            time.sleep(pause)
            times[name].append(runs[name]())
        order.reverse()
    return times


def compare(name, scratch, options, about):
    """Times one network; returns figures."""
    import torch

    folder = checkpoint(NETWORKS[name], scratch)
    module, config = one_step(folder)
    ours, naive = scratch / f"{name}.onnx", scratch / f"{name}-naive.onnx"
    done = subprocess.run([PROGRAMS / "dmd-export", ours, "--from", folder], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    export_by_torch(module, config, naive, dynamo=options.exporter == "dynamo")
    figures = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        for batch in options.batches:
            feed = inputs(config, batch)
            runs = {who: Waiting(provider, ours, threads, batch) for who, provider in PROVIDERS.items()}
            runs |= {"pyort": session(naive, threads, feed), "pyort_ours": session(ours, threads, feed)}
            runs |= torch_runs(module, feed, options.compile)
            times = alternate(runs, options.seconds, options.pause / 1000)
            for run in runs.values():
                run.close()
            medians = {who: [statistics.median(t[i] for t in pairs) for i in (0, 1)] for who, pairs in times.items()}
            print(f"{name}, batch {batch}, {threads} thread{'s' if threads > 1 else ''}")
            for who, pairs in times.items():
                low, _, high = statistics.quantiles([wall for wall, _ in pairs], n=4)
                wall, cpu = medians[who]
                print(
                    f"  {who:10} median {wall * 1000:9.2f} ms, quartiles {low * 1000:.2f} to {high * 1000:.2f}, "
                    f"{len(pairs)} runs; processor time {cpu * 1000:.2f} ms",
                    flush=True,
                )
            case = f"b{batch}_{threads}t_{name}"
            about["times_ms"][case] = {who: [round(wall * 1000, 3) for wall, _ in pairs] for who, pairs in times.items()}
            about["medians_ms"][case] = {who: [round(seconds * 1000, 3) for seconds in both] for who, both in medians.items()}
            for a, b in PAIRS:
                if b in medians:
                    figures[f"{a}_vs_{b}_{case}"] = (medians[a][0] / medians[b][0], LIMITS.get((a, b, batch)))
                    figures[f"cpu_{a}_vs_{b}_{case}"] = (medians[a][1] / medians[b][1], None)
    return figures


def starts(about):
    """Milliseconds from process start to a picture on disk, and the same in processor time."""
    times = {who: [] for who in PROVIDERS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(STARTS):
            for who, provider in PROVIDERS.items():
                command = [PROGRAMS / "dmd-run", ROOT / "assets/one-step-fashion.onnx", "--provider", provider, "--force"]
                command += ["-o", f"{folder}/image.png"]
                start = time.perf_counter()
                child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                _, status, usage = os.wait4(child.pid, 0)
                if status:
                    sys.exit(f"error: {' '.join(map(str, command))} failed")
                times[who].append(((time.perf_counter() - start) * 1000, (usage.ru_utime + usage.ru_stime) * 1000))
    figures = {}
    for who, pairs in times.items():
        wall, cpu = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
        print(f"{who}: process start to picture {wall:.0f} ms, processor time {cpu:.0f} ms, {len(pairs)} starts")
        figures |= {f"start_ms_{who}": (wall, START_LIMITS[who]), f"start_cpu_ms_{who}": (cpu, None)}
    about["starts"] = times
    return figures


def library():
    """The onnxruntime of this Python, so that all rows run the same."""
    import onnxruntime

    found = sorted(glob.glob(f"{pathlib.Path(onnxruntime.__file__).parent}/capi/libonnxruntime.so*"))
    if not found:
        sys.exit("error: the Python package onnxruntime has no libonnxruntime.so")
    os.environ["ORT_DYLIB_PATH"] = found[0]


def main():
    """Measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(number) for number in text.split(",")]
    parser.add_argument("--networks", default=",".join(NETWORKS), help=f"some of {','.join(NETWORKS)} [default: all]")
    parser.add_argument("--batches", type=numbers, default=[1, 16], help="batch sizes [default: 1,16]")
    parser.add_argument("--threads", type=numbers, default=[1, 2], help="threads [default: 1,2]")
    parser.add_argument("--seconds", type=float, default=30, help="per network, threads and batch [default: 30]")
    parser.add_argument(
        "--pause", type=float, default=30, metavar="MS",
        help="before each evaluation, until threads of the row before, which wait busily for more work, sleep [default: 30]",
    )
    parser.add_argument("--exporter", choices=["torchscript", "dynamo"], default="torchscript", help="PyTorch's, for `pyort`")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="file for the raw times")
    options = parser.parse_args()
    unknown = set(options.networks.split(",")) - set(NETWORKS)
    if unknown:
        sys.exit(f"error: got network `{unknown.pop()}`, expected some of {','.join(NETWORKS)}")
    if not (PROGRAMS / "dmd-run").is_file():
        sys.exit(f"error: there is no {PROGRAMS / 'dmd-run'}\n\nhint: run scripts/bench-runtimes")
    import onnxruntime
    import torch

    library()
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    about = provenance.about("bench-runtimes", **versions) | {"medians_ms": {}, "times_ms": {}}
    figures = starts(about)
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.networks.split(","):
            figures |= compare(name, pathlib.Path(scratch), options, about)
    about["figures"] = {name: value for name, (value, _) in figures.items()}
    if options.json:
        options.json.write_text(json.dumps(about) + "\n")
    for name, (value, limit) in figures.items():
        wanted = f"  # wanted: at most {limit:.4g}" if limit is not None and value > limit else ""
        print(f"figure {name} {value:.4g}{wanted}")


if __name__ == "__main__":
    main()
