"""Where a measurement comes from: what every file in docs/results/ says first. Standard library only.

    python3 scripts/provenance.py SCRIPT [ARGUMENT…]    prints it as JSON, for benchmarks in other languages
"""

import json
import os
import pathlib
import platform
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def output(*command):
    """What a command prints, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def processor():
    """The processor's own name, where the system tells it."""
    info = pathlib.Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cores():
    """Processors this program may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def about(script, arguments=None, **versions):
    """Command, date, machine and versions; `versions` are those of what else took part."""
    arguments = sys.argv[1:] if arguments is None else arguments
    changed = "+changes" if output("git", "status", "--porcelain", "--untracked-files=no") else ""
    commit = output("git", "rev-parse", "--short", "HEAD") or "unknown commit"
    compiler = output("rustc", "--version").split()
    ours = {"dmd": commit + changed, "rustc": compiler[1] if len(compiler) > 1 else "unknown"}
    return {
        "command": " ".join([f"scripts/{script}", *arguments]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{cores()} cores, {processor()}, {platform.system()} {platform.machine()}",
        "versions": ours | versions,
    }


if __name__ == "__main__":
    print(json.dumps(about(sys.argv[1], sys.argv[2:])))
