"""`python -m tests.faults --kills 100`: the fault injection suite, as long as you like."""

import argparse
import tempfile
from pathlib import Path

from tests.faults.suite import report, run_suite

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kill runs at random points and compare what comes out.")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(report(run_suite(Path(folder), kills=given.kills, seed=given.seed, workers=given.workers), given.seed))
