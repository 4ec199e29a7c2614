"""Writes a model as another exporter might have: the same images, by an operator that the project's engine does not have.

usage: foreign.py MODEL.onnx OUT.onnx
"""

import sys

import onnx


def main(source, out):
    model = onnx.load(source)
    (output,) = model.graph.output
    for node in model.graph.node:
        node.output[:] = ["inner" if name == output.name else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node("Sum", ["inner"], [output.name]))
    onnx.checker.check_model(model)
    onnx.save(model, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
