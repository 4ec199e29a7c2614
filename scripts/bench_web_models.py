"""Makes the files that scripts/bench-web measures: each network by dmd-export, as f32 and as int8, and by PyTorch's exporter
as a user of PyTorch would, for one image. Run by scripts/bench-web.

usage: bench_web_models.py FOLDER
"""

import pathlib
import subprocess
import sys
import tempfile

from bench_export import EXPORT, checkpoint, export_by_torch, one_step

NETWORKS = {"bundled": "small", "3m": "3m", "cifar": "ddpm-cifar10"}


def main(folder):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, network in NETWORKS.items():
            source = checkpoint(network, pathlib.Path(scratch))
            for suffix, options in {"": [], "-int8": ["--dtype", "int8"]}.items():
                path = folder / f"{name}{suffix}.onnx"
                path.unlink(missing_ok=True)
                subprocess.run([str(EXPORT), str(path), "--from", str(source), *options], check=True)
            module, config = one_step(source)
            export_by_torch(module, config, folder / f"{name}-naive.onnx", dynamo=True, batch=1)
    (folder / "complete").touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
