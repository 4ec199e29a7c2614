"""Counts what cargo-mutants found, for scripts/mutants; the figures of both parts go to one file."""

import json
import pathlib
import sys

import provenance


def main():
    """Prints what was missed and figures."""
    part, shard, folder = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
    found = {}
    for kind in ("caught", "missed", "timeout", "unviable"):
        lines = (folder / f"{kind}.txt").read_text(encoding="utf-8").splitlines()
        found[kind] = [line for line in lines if line]
    for line in found["missed"]:
        print("missed", line)
    noticed = len(found["caught"]) + len(found["timeout"])
    viable = noticed + len(found["missed"])
    figures = {f"viable_{part}": viable, f"caught_{part}": noticed, f"unviable_{part}": len(found["unviable"])}
    figures[f"caught_percent_{part}"] = round(100 * noticed / max(1, viable), 1)
    for name, value in figures.items():
        print(f"figure {name} {value}")
    if len(sys.argv) > 4:
        path = pathlib.Path(sys.argv[4])
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"figures": {}, "missed": {}}
        about = provenance.about("mutants", [part, shard, sys.argv[4]])
        result = about | {"figures": before["figures"] | figures, "missed": before["missed"] | {part: found["missed"]}}
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
