"""`python -m mf_lightning COMMAND`: what happens beside training."""

from __future__ import annotations

import sys

from jsonargparse import auto_cli

from mf_lightning.tools.consolidate import consolidate
from mf_lightning.tools.digits import prepare_digits
from mf_lightning.tools.heartbeat import heartbeat
from mf_lightning.tools.verify import verify
from mf_lightning.types import UserError


def main(args: list[str] | None = None) -> None:
    """Run one command; a mistake of the user's ends in one message and exit code 2."""
    try:
        commands = {
            "prepare-digits": prepare_digits,
            "verify": verify,
            "heartbeat": heartbeat,
            "consolidate": consolidate,
        }
        auto_cli(commands, args=args, prog="python -m mf_lightning")
    except (UserError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
