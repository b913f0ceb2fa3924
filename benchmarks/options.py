"""What both benchmarks ask for on the command line."""

from __future__ import annotations

import argparse
import sys

import torch

from mf_lightning.nets import SIZES


def parser_for(documentation: str, *, batch: int, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options of network, batch, device and output.

    Args:
        documentation: the benchmark's own, shown by --help.
        batch: default batch size.
        rounds: default number of timed rounds.
    """
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", choices=SIZES, help="width and depth of the network")
    parser.add_argument("--patch", type=int, default=2, help="patch size")
    parser.add_argument("--latent", type=int, nargs=3, default=[4, 16, 16], metavar=("C", "H", "W"))
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"], help="of the network")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", action="store_true", help="print the JSON line only, no table")
    return parser


def device_of(args: argparse.Namespace) -> tuple[torch.device, str]:
    """Return the device and its name.

    Raises:
        SystemExit: with code 2 and a message, if it is not there.
    """
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"error: Got --device {args.device}, expected one that is there. Run with --device cpu.", file=sys.stderr)
        raise SystemExit(2)
    device = torch.device(args.device)
    return device, torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
