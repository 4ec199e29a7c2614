#!/usr/bin/env python3
"""Check exported ONNX files with tools that share no code with the exporter.

For each FILE: onnx.checker with full shape inference; the contract's inputs and outputs; the ONNX reference
evaluator against onnxruntime at batches 1, 2 and 7 (or the one that the file is for), with graph optimisation off and on; that
an image does not depend on the others in its batch; that the output `image` is `x_gen` rounded by the contract's formula, to the
bit; and, with --golden, the outputs stored in a safetensors file under the names of the graph's inputs and outputs (`timesteps`
also counts as `t`), such as `dmd-export --golden` writes. Files that compute in 8 bits (`--dtype qdq`) are compared by the root
mean square, because a value that rounds to the next of 256 steps carries others along. --cases leaves inputs and the reference evaluator's
outputs of every FILE as JSON, for readers in other languages.

Needs onnx, onnxruntime and numpy, and safetensors for --golden. Exit status: 0 all agree, 1 a difference, 2 wrong usage or input.
"""

import argparse
import json
import pathlib
import sys

BATCHES = (1, 2, 7)
RMS_IN_8_BITS = 2e-2
PREDICTIONS = {"epsilon": "eps_pred", "sample": "x0_pred", "v_prediction": "v_pred"}


class Difference(Exception):
    """A check failed."""


def main() -> int:
    """Check every file; say what was compared and how far apart the worst values were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", metavar="FILE", nargs="+", help="ONNX file written by dmd-export")
    parser.add_argument("--golden", metavar="FILE", help="safetensors with inputs and outputs (one ONNX file only)")
    parser.add_argument("--cases", metavar="DIR", help="existing folder for inputs and outputs, NAME.json for NAME.onnx")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest absolute difference [1e-4]")
    args = parser.parse_args()
    if args.golden and len(args.files) > 1:
        parser.error("--golden goes with one FILE")
    failed = False
    for path in args.files:
        try:
            for line in check(path, args):
                print(f"{path}: {line}", flush=True)
        except Difference as difference:
            print(f"{path}: FAILED: {difference}", file=sys.stderr)
            failed = True
        except (OSError, ValueError, KeyError) as error:
            print(f"error: cannot check `{path}`: {error}", file=sys.stderr)
            return 2
    return int(failed)


def check(path, args):
    """Yield one line per passed check."""
    import numpy
    import onnx
    import onnxruntime

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
    card, size = contract(model)
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
    reference = attempt("load, reference evaluator", evaluator, model)

    in_8_bits = card["dtype"] == "qdq"
    tolerance, measure = (RMS_IN_8_BITS, " of the root mean square") if in_8_bits else (args.tolerance, "")

    def compare(what, got, expected):
        if got.shape != expected.shape:
            raise Difference(f"{what}: got shape {got.shape}, expected {expected.shape}")
        if not (numpy.isfinite(got).all() and numpy.isfinite(expected).all()):
            raise Difference(f"{what}: values that are not finite")
        if in_8_bits:
            worst = float(numpy.sqrt(numpy.square(got - expected).mean() / numpy.square(expected).mean()))
        else:
            worst = float(numpy.abs(got - expected).max())
        if worst > tolerance:
            raise Difference(f"{what}: differ by {worst:.2e}{measure}, allowed {tolerance:.0e}")
        return worst

    single, cases, worst = None, [], dict.fromkeys(sessions, 0.0)
    batches = [size] if size else BATCHES
    for batch in batches:
        feed = random_feed(numpy, card, batch)
        expected = attempt(f"batch {batch}, reference evaluator", reference.run, None, feed)[0]
        for name, session in sessions.items():
            got, *image = attempt(f"batch {batch}, optimisation {name}", session.run, None, feed)
            if image and (image[0] != pixels(numpy, card, got)).any():
                raise Difference(f"batch {batch}, optimisation {name}: `image` is not `x_gen` rounded")
            difference = compare(f"batch {batch}, optimisation {name}, reference evaluator", got, expected)
            worst[name] = max(worst[name], difference)
            if single is not None:
                compare(f"first image of batch {batch}, optimisation {name}", got[:1], single)
        single = expected[:1] if single is None else single
        cases.append({"inputs": stored(feed), "outputs": stored({model.graph.output[0].name: expected})})
    text = ", ".join(f"{value:.1e} with optimisation {name}" for name, value in worst.items())
    yield f"batches {', '.join(map(str, batches))}: onnxruntime and reference evaluator differ by {text}{measure}"

    if args.cases:
        about = {"model": str(pathlib.Path(path).resolve()), "rms": in_8_bits, "tolerance": tolerance}
        text = json.dumps(about | {"cases": cases})
        (pathlib.Path(args.cases) / f"{pathlib.Path(path).stem}.json").write_text(text + "\n")
    if args.golden:
        from safetensors.numpy import load_file

        tensors = load_file(args.golden)
        tensors.setdefault("t", tensors.get("timesteps"))
        names = [i.name for i in model.graph.input]
        output = model.graph.output[0].name
        if missing := [name for name in [*names, output] if name not in tensors]:
            raise ValueError(f"`{args.golden}` has no tensor {', '.join(f'`{m}`' for m in missing)}")
        if size and size > len(tensors[output]):
            raise ValueError(f"`{args.golden}` has {len(tensors[output])} images, the file takes {size} at once")
        types = {"tensor(float)": numpy.float32, "tensor(int64)": numpy.int64}
        feed = {i.name: tensors[i.name][:size].astype(types[i.type]) for i in sessions["all"].get_inputs()}
        for name, session in sessions.items():
            got = attempt(f"golden, optimisation {name}", session.run, None, feed)[0]
            worst = compare(f"golden, optimisation {name}", got, tensors[output][:size])
            yield f"golden `{output}`: differ by {worst:.1e}{measure} with optimisation {name}"


def evaluator(model):
    """ONNX's reference evaluator; its operators on integers begin with set 19, those of set 18 compute the same."""
    from onnx.defs import get_schema
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.ops.op_dequantize_linear import DequantizeLinear_19
    from onnx.reference.ops.op_quantize_linear import QuantizeLinear_19

    later = {"DequantizeLinear": DequantizeLinear_19, "QuantizeLinear": QuantizeLinear_19}
    about = {name: {"op_domain": "", "op_schema": get_schema(name, 19)} for name in later}
    operators = [type(name, (operator,), about[name]) for name, operator in later.items()]
    return ReferenceEvaluator(model, new_ops=operators)


def stored(tensors):
    """Tensors as JSON has them."""
    return {name: {"type": str(v.dtype), "dims": v.shape, "data": v.ravel().tolist()} for name, v in tensors.items()}


def attempt(what, function, *arguments):
    """Run the function; whatever it raises is a difference, as every valid file runs."""
    try:
        return function(*arguments)
    except Exception as error:
        raise Difference(f"{what}: {error}") from error


def contract(model):
    """Check names, types and shapes of inputs and output against the model card; return it, and the batch size if it is fixed."""
    import onnx

    metadata = {p.key: p.value for p in model.metadata_props}
    if "dmd.card" not in metadata:
        raise Difference("metadata_props has no `dmd.card`")
    card = json.loads(metadata["dmd.card"])
    image = [card["image"][side] for side in ("channels", "height", "width")]
    inputs, output = tensors_of(card)
    real, integer = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    batch = model.graph.output[0].type.tensor_type.shape.dim[0].dim_value or "n"
    expected = {inputs[0]: (real, [batch, *image]), output: (real, [batch, *image])}
    if "t" in inputs:
        expected["t"] = (real, [batch])
    if card.get("classes"):
        expected["class"] = (integer, [batch])
    got = {}
    for value in [*model.graph.input, *model.graph.output]:
        kind = value.type.tensor_type
        got[value.name] = (kind.elem_type, [d.dim_param or d.dim_value for d in kind.shape.dim])
    if "image" in got and card["kind"] == "generator":
        expected["image"] = (onnx.TensorProto.UINT8, [batch, *image[1:], image[0]])
    if got != expected:
        raise Difference(f"inputs and outputs: got {got}, expected {expected}")
    if model.graph.value_info:
        raise Difference("value_info is not empty")
    return card, None if batch == "n" else batch


def pixels(numpy, card, x_gen):
    """Bytes of images, as docs/onnx.md rounds them."""
    low, high = map(numpy.float32, card["image"]["range"])
    share = numpy.clip((x_gen - low) / (high - low), numpy.float32(0), numpy.float32(1))
    return numpy.floor(share * numpy.float32(255) + numpy.float32(0.5)).astype(numpy.uint8).transpose(0, 2, 3, 1)


def tensors_of(card):
    """Names of the inputs but for the class, and of the output."""
    if card["kind"] == "generator":
        return ["z"], "x_gen"
    return ["x_t", "t"], PREDICTIONS[card["schedule"]["prediction_type"]]


def random_feed(numpy, card, batch):
    """Inputs whose first image is the same for every batch size."""
    image = [card["image"][side] for side in ("channels", "height", "width")]
    inputs, _ = tensors_of(card)
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
