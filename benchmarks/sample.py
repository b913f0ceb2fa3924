"""Images per second of one-step sampling: generator, decoder and feature extractor apart; one image in torch and ONNX.

python benchmarks/sample.py                                # SiT-S/2 on 16x16x4 latents, on the CPU, plain and compiled
python benchmarks/sample.py --single --rounds 20           # one latent only: eager, compiled, ONNX
python benchmarks/sample.py --single --image --rounds 20   # and one image, with its decoder
python benchmarks/sample.py --size XL --latent 4 32 32 --batch 64 --device cuda --precision bf16-mixed --cuda-graphs

The network has random weights, and so have decoder and extractor, of the architecture of SD-VAE and of Inception, unless files
are given: the time does not depend on them. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.options import device_of, parser_for
from benchmarks.single_image import latencies
from mf_lightning.autoencoders import KLAutoencoder
from mf_lightning.flow import sample, time_grid
from mf_lightning.flow.passes import check_compiler, compiled_generator
from mf_lightning.metrics.extractor import Extractor
from mf_lightning.nets import SiT
from mf_lightning.pixels import to_uint8
from mf_lightning.types import LatentSpec, UserError

SD_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
}


def seconds(call: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Return the median wall time of a call, after one that is not counted."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    call()
    taken = []
    for _ in range(rounds):
        start = now()
        call()
        taken.append(now() - start)
    return statistics.median(taken)


def network(args: argparse.Namespace, device: torch.device) -> SiT:
    """Return a network of the size asked for, with random weights."""
    torch.manual_seed(0)
    return SiT.of_size(args.size, LatentSpec(tuple(args.latent), 1000), patch_size=args.patch).to(device).eval()


def generators(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return one-step sampling of (noise, labels) in each mode."""
    net = network(args, device)
    calls = {"plain": net}
    if not args.no_compile:
        check_compiler(device)
        calls["compiled"] = compiled_generator(net)
    if args.cuda_graphs:
        if device.type != "cuda":
            raise UserError(f"Got --cuda-graphs on {device}, expected a GPU. Leave it out.")
        calls["cuda graphs"] = compiled_generator(net, mode="reduce-overhead")

    def one_step(call):
        def run(noise: Tensor, y: Tensor) -> Tensor:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16-mixed"):
                return sample(call, noise, y=y, grid=time_grid(1))

        return run

    return {name: one_step(call) for name, call in calls.items()}


def decoders(args: argparse.Namespace, folder: Path, device: torch.device) -> dict[str, KLAutoencoder]:
    """Return the decoder in each layout and precision."""
    source = args.autoencoder
    if source is None:
        from diffusers import AutoencoderKL

        torch.manual_seed(0)
        source = str(folder / "autoencoder")
        AutoencoderKL(in_channels=3, out_channels=3, **SD_VAE).save_pretrained(source)
    kinds = {"plain": {}, "channels_last": {"channels_last": True}}
    kinds["bfloat16, channels_last"] = {"channels_last": True, "decode_dtype": "bfloat16"}
    return {name: KLAutoencoder(source, **options).to(device) for name, options in kinds.items()}


def extractor(args: argparse.Namespace, folder: Path, device: torch.device) -> Extractor:
    """Return torch-fidelity's Inception."""
    weights = args.extractor_weights
    if weights is None:
        from tests.parity.inception import seeded_inception_weights

        weights = str(folder / "inception.pth")
        torch.save(seeded_inception_weights(0), weights)
    return Extractor("inception-v3-compat", weights=weights).to(device)


@torch.no_grad()
def measure(args: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, dict]:
    """Return the figures by part and mode."""
    if args.single and args.precision != "32-true":
        raise UserError(f"Got --single with --precision {args.precision}, expected 32-true, in which ONNX runs. Leave one out.")
    if args.precision == "32-true":
        net = network(args, device)
        single = {"one latent": latencies(args, net, None, device)}
        if args.image:
            single["one image"] = latencies(args, net, decoders(args, folder, device)["plain"], device)
        if args.single:
            return single
    else:
        single = {}
    shape, found = tuple(args.latent), {"generator": {}, "decoder": {}, "extractor": {}}
    noise, y = torch.randn(args.batch, *shape, device=device), torch.randint(1000, (args.batch,), device=device)
    for name, generator in generators(args, device).items():
        batch = seconds(lambda run=generator: run(noise, y), args.rounds, device)
        one = seconds(lambda run=generator: run(noise[:1], y[:1]), args.rounds, device)
        found["generator"][name] = {"images_per_second": args.batch / batch, "latency_ms": 1000 * one}
    images = None
    for name, autoencoder in decoders(args, folder, device).items():
        try:
            images = to_uint8(autoencoder.decode(noise))
        except UserError as error:
            found["decoder"][name] = {"refused": str(error), "equal_share": autoencoder.equal_share}
            if args.refused_too:
                taken = seconds(lambda decode=autoencoder._fast: decode(noise), 1, device)
                found["decoder"][name]["images_per_second"] = args.batch / taken
            continue
        batch = seconds(lambda decode=autoencoder.decode: decode(noise), args.rounds, device)
        one = seconds(lambda decode=autoencoder.decode: decode(noise[:1]), args.rounds, device)
        row = {"images_per_second": args.batch / batch, "latency_ms": 1000 * one, "equal_share": autoencoder.equal_share}
        found["decoder"][name] = row
    features = extractor(args, folder, device)
    taken = seconds(lambda: features.features(images), args.rounds, device)
    found["extractor"]["inception-v3-compat"] = {"images_per_second": args.batch / taken}
    return {**found, **single}


def table(found: dict[str, dict]) -> str:
    lines = [f"{'':40}{'images/s':>10}{'one image, ms':>16}{'equal uint8':>14}{'of eager':>10}"]
    for part, rows in found.items():
        for name, row in rows.items():
            speed = f"{row['images_per_second']:.2f}" if "images_per_second" in row else "-" if "ratio" in row else "refused"
            latency = f"{row['latency_ms']:.1f}" if "latency_ms" in row else "-"
            equal = f"{row['equal_share']:.3%}" if row.get("equal_share") is not None else "-"
            ratio = f"{row['ratio']:.2f}" if "ratio" in row else "-"
            lines.append(f"{part + ', ' + name:40}{speed:>10}{latency:>16}{equal:>14}{ratio:>10}")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_for(__doc__, batch=8, rounds=5)
    parser.add_argument("--no-compile", action="store_true", help="plain sampling only")
    parser.add_argument("--no-onnx", action="store_true", help="one image in torch only")
    parser.add_argument(
        "--single", action="store_true", help="only one latent of a random network: eager, compiled, ONNX, in turn"
    )
    parser.add_argument("--image", action="store_true", help="also one image: the decoder behind the network")
    parser.add_argument("--cuda-graphs", action="store_true", help="also captured in CUDA graphs")
    parser.add_argument("--autoencoder", help="folder in diffusers' layout instead of random SD-VAE weights")
    parser.add_argument("--extractor-weights", help="file of Inception weights instead of random ones")
    parser.add_argument("--refused-too", action="store_true", help="time a decoder that is refused for its rounding as well")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run, print, and return the exit code."""
    args = parse(argv)
    device, name = device_of(args)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(args, device, Path(folder))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not args.json:
        setting = f"SiT-{args.size}/{args.patch}, latents {tuple(args.latent)}, batch {args.batch}, {args.precision}"
        print(f"{setting}, {name}, torch {torch.__version__}\n\n{table(found)}")
    report = {**found, "settings": vars(args), "device": name, "torch": torch.__version__}
    print(json.dumps({**report, "python": platform.python_version()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
