"""Sums up the runs that scripts/fuzz has noted, by target, for docs/results/: those in the cache and those in the file already."""

import json
import pathlib
import sys

import provenance

TARGETS = pathlib.Path(__file__).resolve().parent.parent / "fuzz/targets"

def main():
    """Reads, adds, writes."""
    source, target = map(pathlib.Path, sys.argv[1:])
    empty = {"minutes": 0.0, "executions": 0, "findings": 0, "versions": [], "dates": []}
    targets = {path.stem: dict(empty) for path in sorted(TARGETS.glob("*.rs"))}
    # The cache may be another than the last time's.
    runs = json.loads(target.read_text(encoding="utf-8"))["runs"] if target.exists() else []
    noted = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    runs += [run for run in noted if run not in runs]
    for run in runs:
        row = targets.setdefault(run["target"], dict(empty))
        row["minutes"] = round(row["minutes"] + run["seconds"] / 60, 2)
        row["executions"] += run["executions"]
        row["findings"] += run["found"]
        row["versions"] = sorted({*row["versions"], run["dmd"]})
        row["dates"] = sorted({*row["dates"], run["date"]})
    for name, row in sorted(targets.items()):
        print(f"figure minutes_{name} {row['minutes']}")
    figures = {"targets": len(targets), "least_minutes": min(row["minutes"] for row in targets.values())}
    figures |= {"executions": sum(row["executions"] for row in targets.values()), "findings": sum(row["findings"] for row in targets.values())}
    result = provenance.about("fuzz", ["record", sys.argv[2]]) | {"figures": figures, "targets": dict(sorted(targets.items()))}
    text = json.dumps(result | {"runs": None}, indent=1)
    lines = ",\n".join("  " + json.dumps(run) for run in runs)
    target.write_text(text.replace('"runs": null', f'"runs": [\n{lines}\n ]') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
