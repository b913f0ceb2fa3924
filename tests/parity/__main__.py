"""``python -m tests.parity DIR [--json]``: exit code 0 if nothing FAILs, 1 if something does, 2 if nothing is there."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence

from mf_lightning.types import UserError
from tests.parity.report import DEVIATES, FAIL, NOT_BUILT, OK, Row
from tests.parity.suite import check_directory


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description="Compare with stored numbers.")
    parser.add_argument("folder", metavar="DIR", help="folder of .npz files")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args(argv)
    try:
        rows = check_directory(args.folder)
    except UserError as error:
        print(error, file=sys.stderr)
        if args.json:
            print(json.dumps({"ok": False, "rows": [], "counts": {}, "problem": str(error)}))
        return 2
    counts = Counter(dict.fromkeys((OK, FAIL, DEVIATES, NOT_BUILT), 0))
    counts.update(row.status for row in rows)
    print(table(rows))
    print(", ".join(f"{number} {status}" for status, number in counts.items()))
    if args.json:
        report = {"ok": counts[FAIL] == 0, "rows": [as_json(row) for row in rows], "counts": dict(counts)}
        print(json.dumps(report, allow_nan=False))
    return 1 if counts[FAIL] else 0


def table(rows: Sequence[Row]) -> str:
    """Return the rows as aligned text."""
    cells = [("file", "quantity", "status", "error", "bound", "note")]
    cells += [(row.file, row.quantity, row.status, _number(row.error), _number(row.bound), row.note) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    padded = [[text.ljust(width) for text, width in zip(line, [*widths, 0], strict=True)] for line in cells]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def as_json(row: Row) -> dict:
    """Return a row as plain values; an error that is no number becomes null, for JSON knows no NaN."""
    found = dict(vars(row))
    if row.error is not None and not math.isfinite(row.error):
        found |= {"error": None, "note": row.note or "not a number, or infinite"}
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


if __name__ == "__main__":
    sys.exit(main())
