"""Sums up a report of cargo-llvm-cov (lcov) by the parts of the project, for scripts/coverage."""

import argparse
import collections
import json
import pathlib

import provenance

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOSSES = ["losses", "distillation", "regression", "perceptual"]
PARTS = {
    "core": ["core/src/"],
    "export": ["export/src/"],
    "losses": [f"distill/src/{name}.rs" for name in LOSSES],
    "engine": ["engine/src/"],
    "runtime_native": ["runtime-native/src/"],
    "distill": ["distill/src/"],
}
# Parts whose lines are listed.
LISTED = ("core", "export", "losses")


def read(report):
    """How often each line ran, by file, without unit tests."""
    files = collections.defaultdict(dict)
    for line in report.read_text(encoding="utf-8").splitlines():
        kind, _, value = line.partition(":")
        if kind == "SF":
            path = pathlib.Path(value)
            own = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else None
            source = path.read_text(encoding="utf-8").splitlines() if own else []
            end = next((n for n, text in enumerate(source, 1) if text.startswith("#[cfg(test)]")), len(source) + 1)
        elif kind == "DA" and own:
            number, count = map(int, value.split(",")[:2])
            if number < end:
                files[own][number] = max(count, files[own].get(number, 0))
    return files


def main():
    """Prints lines and figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=pathlib.Path)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    arguments = parser.parse_args()
    files, figures, missed = read(arguments.report), {}, {}
    for part, prefixes in PARTS.items():
        found = {name: lines for name, lines in sorted(files.items()) if name.startswith(tuple(prefixes))}
        counts = [count for lines in found.values() for count in lines.values()]
        figures[f"lines_{part}"] = len(counts)
        figures[f"covered_percent_{part}"] = round(100 * sum(map(bool, counts)) / max(1, len(counts)), 1)
        if part in LISTED:
            missed |= {name: [n for n, count in sorted(lines.items()) if not count] for name, lines in found.items()}
    missed = {name: lines for name, lines in missed.items() if lines}
    for name, lines in missed.items():
        print(f"{name}: {', '.join(map(str, lines))}")
    for name, value in figures.items():
        print(f"figure {name} {value}")
    if arguments.json:
        result = provenance.about("coverage", ["--json", str(arguments.json)]) | {"figures": figures, "missed": missed}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
