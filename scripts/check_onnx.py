#!/usr/bin/env python3
"""Check exported ONNX files with tools that share no code with the exporter.

For each FILE: onnx.checker with full shape inference; the contract's inputs and outputs; the ONNX reference
evaluator against onnxruntime at batches 1, 2 and 7, or the file's fixed one, with graph optimisation off and on; that
an image does not depend on the others in its batch; that the output `image` is `x_gen` rounded by the contract's
formula, to the bit; and, with --golden, the outputs stored in a safetensors file under the names of the graph's inputs
and outputs (`timesteps` also counts as `t`), such as `dmd-export --golden` writes.

Needs onnx, onnxruntime and numpy. The reference evaluator has DequantizeLinear, of int8 files, from opset 19 on. Exit status: 0 all agree, 1 a difference, 2 wrong usage or input.
"""

import argparse
import json
import sys

BATCHES = (1, 2, 7)
TENSORS = {
    "generator": (["z"], "x_gen"),
    "teacher": (["x_t", "t"], "eps_pred"),
}


class Difference(Exception):
    """A check failed."""


def main() -> int:
    """Check every file; say what was compared and how far apart the worst values were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", metavar="FILE", nargs="+", help="ONNX file written by dmd-export")
    parser.add_argument("--golden", metavar="FILE", help="safetensors with inputs and outputs (one ONNX file only)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest absolute difference [1e-4]")
    args = parser.parse_args()
    if args.golden and len(args.files) > 1:
        parser.error("--golden goes with one FILE")
    failed = False
    for path in args.files:
        try:
            for line in check(path, args.golden, args.tolerance):
                print(f"{path}: {line}")
        except Difference as difference:
            print(f"{path}: FAILED: {difference}", file=sys.stderr)
            failed = True
        except (OSError, ValueError, KeyError) as error:
            print(f"error: cannot check `{path}`: {error}", file=sys.stderr)
            return 2
    return int(failed)


def check(path, golden, tolerance):
    """Yield one line per passed check."""
    import numpy
    import onnx
    import onnxruntime
    from onnx.reference import ReferenceEvaluator

    try:
        model = onnx.load(path)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"not an ONNX file: {error}") from error
    try:
        onnx.checker.check_model(model, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise Difference(f"onnx.checker: {error}") from error
    card, fixed = contract(model)
    opset = ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import)
    if any(o.domain for o in model.opset_import):
        raise Difference(f"opset {opset}: expected the default domain only")
    yield f"checker and shape inference pass, {opset}, {len(model.graph.node)} nodes, {len(inferred.graph.value_info)} shapes"

    sessions = {}
    for name, level in (
        ("off", onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL),
        ("all", onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL),
    ):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        sessions[name] = attempt(f"load, optimisation {name}", onnxruntime.InferenceSession, path, options, providers)
    reference = ReferenceEvaluator(model)

    def compare(what, got, expected):
        if got.shape != expected.shape:
            raise Difference(f"{what}: got shape {got.shape}, expected {expected.shape}")
        if not (numpy.isfinite(got).all() and numpy.isfinite(expected).all()):
            raise Difference(f"{what}: values that are not finite")
        worst = float(numpy.abs(got - expected).max())
        if worst > tolerance:
            raise Difference(f"{what}: differ by {worst:.2e}, allowed {tolerance:.0e}")
        return worst

    single = None
    for batch in BATCHES if fixed is None else (fixed,):
        feed = random_feed(numpy, card, batch)
        expected = attempt(f"batch {batch}, reference evaluator", reference.run, None, feed)[0]
        worst = {}
        for name, session in sessions.items():
            got, *image = attempt(f"batch {batch}, optimisation {name}", session.run, None, feed)
            if image and (image[0] != pixels(numpy, card, got)).any():
                raise Difference(f"batch {batch}, optimisation {name}: `image` is not `x_gen` rounded")
            worst[name] = compare(f"batch {batch}, optimisation {name}, reference evaluator", got, expected)
            if single is not None:
                compare(f"first image of batch {batch}, optimisation {name}", got[:1], single)
        single = expected[:1] if single is None else single
        text = ", ".join(f"{value:.1e} with optimisation {name}" for name, value in worst.items())
        yield f"batch {batch}: onnxruntime and reference evaluator differ by {text}"

    if golden:
        tensors = stored_tensors(numpy, golden)
        tensors.setdefault("t", tensors.get("timesteps"))
        names = [i.name for i in model.graph.input]
        output = model.graph.output[0].name
        if missing := [name for name in [*names, output] if name not in tensors]:
            raise ValueError(f"`{golden}` has no tensor {', '.join(f'`{m}`' for m in missing)}")
        types = {"tensor(float)": numpy.float32, "tensor(int64)": numpy.int64}
        if fixed is not None and fixed > len(tensors[output]):
            raise ValueError(f"`{golden}` has {len(tensors[output])} images, the file takes {fixed} at once")
        feed = {i.name: tensors[i.name][:fixed].astype(types[i.type]) for i in sessions["all"].get_inputs()}
        for name, session in sessions.items():
            got = attempt(f"golden, optimisation {name}", session.run, None, feed)[0]
            worst = compare(f"golden, optimisation {name}", got, tensors[output][:fixed])
            yield f"golden `{output}`: differ by {worst:.1e} with optimisation {name}"


def stored_tensors(numpy, path):
    """Tensors of a safetensors file by name: length of the header, JSON, values."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        values = file.read()
    types = {"F32": numpy.float32, "F64": numpy.float64, "I64": numpy.int64}
    header.pop("__metadata__", None)
    return {
        name: numpy.frombuffer(values[slice(*t["data_offsets"])], types[t["dtype"]]).reshape(t["shape"])
        for name, t in header.items()
    }


def attempt(what, function, *arguments):
    """Run the function; whatever it raises is a difference, as every valid file runs."""
    try:
        return function(*arguments)
    except Exception as error:
        raise Difference(f"{what}: {error}") from error


def contract(model):
    """Check names, types and shapes of inputs and outputs against the model card; return it and the fixed batch."""
    import onnx

    metadata = {p.key: p.value for p in model.metadata_props}
    if "dmd.card" not in metadata:
        raise Difference("metadata_props has no `dmd.card`")
    card = json.loads(metadata["dmd.card"])
    image = [card["image"][side] for side in ("channels", "height", "width")]
    inputs, output = TENSORS[card["kind"]]
    real, integer = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    first = model.graph.input[0].type.tensor_type.shape.dim[0]
    batch = first.dim_value or "n"
    expected = {inputs[0]: (real, [batch, *image]), output: (real, [batch, *image])}
    if "t" in inputs:
        expected["t"] = (real, [batch])
    if card.get("classes"):
        expected["class"] = (integer, [batch])
    if any(value.name == "image" for value in model.graph.output):
        channels, height, width = image
        expected["image"] = (onnx.TensorProto.UINT8, [batch, height, width, channels])
    got = {}
    for value in [*model.graph.input, *model.graph.output]:
        kind = value.type.tensor_type
        got[value.name] = (kind.elem_type, [d.dim_param or d.dim_value for d in kind.shape.dim])
    if got != expected:
        raise Difference(f"inputs and outputs: got {got}, expected {expected}")
    if model.graph.value_info:
        raise Difference("value_info is not empty")
    return card, first.dim_value or None


def pixels(numpy, card, x_gen):
    """Bytes of images, as docs/onnx.md rounds them."""
    low, high = map(numpy.float32, card["image"]["range"])
    share = numpy.clip((x_gen - low) / (high - low), numpy.float32(0), numpy.float32(1))
    return numpy.floor(share * numpy.float32(255) + numpy.float32(0.5)).astype(numpy.uint8).transpose(0, 2, 3, 1)


def random_feed(numpy, card, batch):
    """Inputs whose first image is the same for every batch size."""
    image = [card["image"][side] for side in ("channels", "height", "width")]
    inputs, _ = TENSORS[card["kind"]]
    noise = numpy.random.default_rng(0).standard_normal([batch, *image], dtype=numpy.float32)
    feed = {inputs[0]: noise}
    if "t" in inputs:
        last = card["schedule"]["num_train_timesteps"] - 1
        feed["t"] = numpy.round(numpy.linspace(last, 0, max(BATCHES))[:batch]).astype(numpy.float32)
    if card.get("classes"):
        feed["class"] = numpy.arange(batch, dtype=numpy.int64) % card["classes"]["count"]
    return feed


if __name__ == "__main__":
    sys.exit(main())
