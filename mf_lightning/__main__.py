"""`python -m mf_lightning COMMAND`: what happens beside training."""

from __future__ import annotations

import json
import sys

from jsonargparse import auto_cli

from mf_lightning.tools.adopt import adopt
from mf_lightning.tools.consolidate import consolidate
from mf_lightning.tools.dashboard import dashboard
from mf_lightning.tools.demo import demo
from mf_lightning.tools.digits import prepare_digits
from mf_lightning.tools.encode import encode
from mf_lightning.tools.export import export
from mf_lightning.tools.heartbeat import heartbeat
from mf_lightning.tools.import_weights import import_weights
from mf_lightning.tools.phema import phema
from mf_lightning.tools.reference import reference
from mf_lightning.tools.report import report
from mf_lightning.tools.sample import sample
from mf_lightning.tools.stats import stats
from mf_lightning.tools.verify import verify
from mf_lightning.types import UserError

FLAGS = ("--json", "--interpolate")
"""Options that mean true when they stand alone."""


def main(args: list[str] | None = None) -> None:
    """Run one command; a mistake of the user's ends in one message and exit code 2, an interrupt in one and 130."""
    args = _with_values(sys.argv[1:] if args is None else args)
    try:
        commands = {
            "prepare-digits": prepare_digits,
            "adopt": adopt,
            "encode": encode,
            "verify": verify,
            "stats": stats,
            "reference": reference,
            "heartbeat": heartbeat,
            "consolidate": consolidate,
            "phema": phema,
            "import": import_weights,
            "sample": sample,
            "demo": demo,
            "export": export,
            "report": report,
            "dashboard": dashboard,
        }
        auto_cli(commands, args=args, prog="python -m mf_lightning")
    except (UserError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        kept = ": finished shards are kept, the same command goes on" if args[:1] == ["encode"] else ""
        print(f"\ninterrupted{kept}", file=sys.stderr)
        sys.exit(130)


def _with_values(args: list[str]) -> list[str]:
    """Return the arguments as jsonargparse wants them: ``--num-heads`` as ``--num_heads``, a flag alone as ``--json=true``, RUN
    RUN as one list."""
    args = [_with_underscores(arg) for arg in args]
    if args[:1] == ["report"]:
        count = next((number for number, arg in enumerate(args[1:]) if arg.startswith("-")), len(args) - 1)
        runs, options = args[1 : 1 + count], args[1 + count :]
        args = ["report", *([json.dumps(runs)] if runs else []), *options]
    following = [*args[1:], ""]
    return [
        f"{arg}=true" if arg in FLAGS and after not in ("true", "false") else arg
        for arg, after in zip(args, following, strict=True)
    ]


def _with_underscores(arg: str) -> str:
    """Return an option with its name as the commands spell it, and its value as it is."""
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


if __name__ == "__main__":
    main()
