"""What a MeanFlow training step costs over a flow-matching step of the same network: interleaved, in one process.

python benchmarks/train_step.py              # SiT-S/2 on 16x16x4 latents, batch 32, eager, on the CPU
python benchmarks/train_step.py --mode compiled
python benchmarks/train_step.py --size XL --latent 4 32 32 --batch 128 --device cuda --precision bf16-mixed --mode both

A step is the loss and its backward pass; noise and times are drawn before the clock starts, optimizer and EMA cost every
variant the same and are left out (--optimizer puts them in). Ratios are medians over rounds of (variant / flow matching).
The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.options import device_of, parser_for
from mf_lightning.flow import Draw, DropFirstRows, Guidance, MeanFlowLoss, Passes
from mf_lightning.flow.passes import PLAIN
from mf_lightning.nets import SiT
from mf_lightning.types import LatentSpec, UserError

CLASSES = 1000
GUIDANCES = {"none": Guidance(), "kappa0": Guidance(omega=2.0), "kappa0.5": Guidance(omega=1.0, kappa=0.5)}
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0}
"""Dense bfloat16, by a part of the device's name; others by --peak-tflops."""


@dataclass
class Bench:
    """One network and the batches that every variant sees."""

    net: nn.Module
    x: Tensor
    y: Tensor
    draws: list[Draw]
    optimizer: torch.optim.Optimizer | None
    ema: list[Tensor]
    autocast: Callable[[], torch.autocast]

    def step(self, loss: Callable[[Draw], Tensor], number: int) -> None:
        """Run one step of a variant."""
        self.net.zero_grad(set_to_none=True)
        with self.autocast():
            value = loss(self.draws[number % len(self.draws)])
        value.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(self.ema, list(self.net.parameters()), 1e-4)


def flow_matching(bench: Bench, passes: Passes) -> Callable[[Draw], Tensor]:
    """Return plain flow matching, written out: one forward, the mean squared error to e - x."""

    def loss(draw: Draw) -> Tensor:
        t = draw.t.to(bench.x)
        t4 = t[:, None, None, None]
        y = torch.where(draw.dropped.to(t.device), CLASSES, bench.y)
        u = passes.u(bench.net, (1 - t4) * bench.x + t4 * draw.e, t=t, r=t, y=y)
        return (u - (draw.e - bench.x)).square().flatten(1).sum(1).mean()

    return loss


def meanflow(bench: Bench, passes: Passes, guidance: Guidance, args: argparse.Namespace) -> Callable[[Draw], Tensor]:
    """Return this project's loss."""
    loss = MeanFlowLoss(guidance=guidance, jvp=args.jvp, jvp_precision=args.jvp_precision)
    return lambda draw: loss(bench.net, bench.x, bench.y, draw, y_null=CLASSES, passes=passes).loss


def naive(bench: Bench, guidance: Guidance, compiled: bool) -> Callable[[Draw], Tensor]:
    """Return the common form: one torch.func.jvp over the whole batch inside the graph, guidance forwards of the batch."""

    def of(x: Tensor, e: Tensor, t: Tensor, r: Tensor, dropped: Tensor, y: Tensor) -> Tensor:
        t4, r4 = t[:, None, None, None], r[:, None, None, None]
        z, v_t = (1 - t4) * x + t4 * e, e - x
        null = torch.full_like(y, CLASSES)
        v_g = v_t
        if not guidance.is_none:
            with torch.no_grad():
                v_u = bench.net(z, t=t, r=t, y=null)
                v_c = bench.net(z, t=t, r=t, y=y) if guidance.kappa else None
                v_g = torch.where(dropped[:, None, None, None], v_t, guidance.velocity(v_t, v_c=v_c, v_u=v_u))
            torch.clear_autocast_cache()
        labels = torch.where(dropped, null, y)
        with sdpa_kernel(SDPBackend.MATH):
            u, dudt = torch.func.jvp(
                lambda z, t, r: bench.net(z, t=t, r=r, y=labels),
                (z, t, r),
                (v_g.to(z.dtype), torch.ones_like(t), torch.zeros_like(r)),
            )
        error = (u - (v_g - (t4 - r4) * dudt).detach()).square().flatten(1).sum(1)
        return (error / (error.detach() + 0.01)).mean()

    call = torch.compile(of, dynamic=False) if compiled else of
    return lambda d: call(bench.x, d.e, d.t.to(bench.x), d.r.to(bench.x), d.dropped.to(bench.x.device), bench.y)


def make_bench(args: argparse.Namespace) -> Bench:
    """Build the network and a few batches, all from seed 0."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    settings = {"attention": args.attention, "jvp_attention": args.jvp_attention}
    settings |= {"activation_checkpointing": args.activation_checkpointing}
    net = SiT.of_size(args.size, LatentSpec(tuple(args.latent), CLASSES), patch_size=args.patch, **settings).to(device)
    with torch.no_grad():  # a fresh network multiplies by zeros
        for parameter in net.parameters():
            parameter.normal_(std=0.02)
    net.check_device(device, torch.bfloat16 if args.precision == "bf16-mixed" else torch.float32)
    x = torch.randn(args.batch, *args.latent, device=device)
    y = torch.randint(CLASSES, (args.batch,), device=device)
    plan = MeanFlowLoss(fm_fraction=args.fm_fraction, label_drop=DropFirstRows(0.1))
    rows = torch.arange(args.batch)
    draws = [plan.draw_training(x, rows, seed=0, step=step, global_batch_size=args.batch) for step in range(8)]
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-6, fused=True) if args.optimizer else None
    ema = [p.detach().clone() for p in net.parameters()] if args.optimizer else []

    def autocast() -> torch.autocast:  # without its cache, as Lightning
        mixed = args.precision == "bf16-mixed"
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed, cache_enabled=False)

    return Bench(net, x, y, draws, optimizer, ema, autocast)


def variants(bench: Bench, mode: str, args: argparse.Namespace) -> dict[str, Callable[[Draw], Tensor]]:
    """Return every loss to time, flow matching first."""
    compiled = mode == "compiled"
    passes = Passes.compiled(bench.x.device) if compiled else PLAIN
    found = {"fm": flow_matching(bench, passes)}
    found |= {name: meanflow(bench, passes, guidance, args) for name, guidance in GUIDANCES.items()}
    if not args.no_naive:
        found |= {f"naive_{name}": naive(bench, GUIDANCES[name], compiled) for name in ("none", "kappa0.5")}
    return {name: loss for name, loss in found.items() if name == "fm" or args.variants is None or name in args.variants}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(bench: Bench, loss: Callable[[Draw], Tensor], number: int) -> float:
    """Return the wall time of one step."""
    synchronize(bench.x.device)
    start = time.perf_counter()
    bench.step(loss, number)
    synchronize(bench.x.device)
    return time.perf_counter() - start


def memory(bench: Bench, run: Callable[[], object]) -> tuple[int, int]:
    """Return the bytes that are alive after a call and the most during it, above what lay there before (weights, batches)."""
    device = bench.x.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = run()
        synchronize(device)
        after, most = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        del kept
        return after - before, most - before
    with quiet_stderr(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        kept = run()
    now = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    del kept
    return now, most


def saved_bytes(bench: Bench, loss: Callable[[Draw], Tensor]) -> int:
    """Return the bytes that are alive between a loss and its backward pass: what autograd keeps for it."""
    bench.net.zero_grad(set_to_none=True)

    def run() -> Tensor:
        with bench.autocast():
            return loss(bench.draws[0])

    return memory(bench, run)[0]


def peak_bytes(bench: Bench, loss: Callable[[Draw], Tensor]) -> int:
    """Return the most memory that a step holds above what lay there before it; the gradients are part of it."""
    bench.net.zero_grad(set_to_none=True)
    return memory(bench, lambda: bench.step(loss, 0))[1]


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Keep torch's profiler, which announces each start from C++, from writing between the lines of the table."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def measure(bench: Bench, mode: str, args: argparse.Namespace) -> dict[str, dict]:
    """Time all variants in turns and return each one's figures; one that torch cannot run says why."""
    losses, results = variants(bench, mode, args), {}
    for name, loss in dict(losses).items():
        try:
            start = time.perf_counter()
            for number in range(len(bench.draws)) if mode == "compiled" else range(1):  # every size is compiled before
                bench.step(loss, number)
            results[name] = {"first_seconds": time.perf_counter() - start}
            results[name]["peak_bytes"] = peak_bytes(bench, loss)
            results[name]["saved_bytes"] = saved_bytes(bench, loss)
        except Exception as error:
            if not name.startswith("naive"):
                raise
            results[name] = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
            del losses[name]
    times: dict[str, list[float]] = {name: [] for name in losses}
    for number in range(args.rounds):
        print(f"\r{mode}: round {number + 1} of {args.rounds}", end="", file=sys.stderr, flush=True)
        order = list(losses)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            times[name].append(seconds(bench, losses[name], number))
    print(file=sys.stderr)
    for name, taken in times.items():
        median = statistics.median(taken)
        ratios = [mine / plain for mine, plain in zip(taken, times["fm"], strict=True)]
        results[name] |= {"seconds": median, "images_per_second": args.batch / median, "ratio": statistics.median(ratios)}
    return results


def forward_flops(args: argparse.Namespace) -> int:
    """Return the floating-point operations of one image's forward pass, two for each multiply-add, counted by torch."""
    with torch.device("meta"):
        net = SiT.of_size(args.size, LatentSpec(tuple(args.latent), CLASSES), patch_size=args.patch, attention="math")
        one = torch.zeros(1)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.zeros(1, *args.latent), t=one, r=one, y=torch.zeros(1, dtype=torch.int64))
    return counter.get_total_flops()


def useful_forwards(name: str, jumps: float) -> float:
    """Return the forwards of the batch that a step is worth: 3 for flow matching, 3.5 and 4.65 for MeanFlow on a quarter.

    A backward pass is two; a derivative is counted as a JVP of its own, two forwards of its rows (shared primals do it in
    one); guidance takes 0.9 of the batch for v_u and, with kappa > 0, the r < t rows for v_c.
    """
    guidance = {"kappa0": 0.9, "kappa0.5": 0.9 + jumps}.get(name, 0.0)
    return 3 + (0 if name == "fm" else 2 * jumps + guidance)


def add_mfu(results: dict[str, dict], flops: int, args: argparse.Namespace) -> None:
    """Add the share of the device's peak that the step's useful arithmetic reaches, where the peak is known."""
    peak = args.peak_tflops
    if peak is None and args.device.startswith("cuda") and args.precision == "bf16-mixed":
        name = torch.cuda.get_device_name()
        peak = next((value for part, value in PEAK_TFLOPS.items() if part in name), None)
    for name, row in results.items():
        if peak is not None and "seconds" in row:
            work = flops * args.batch * useful_forwards(name.removeprefix("naive_"), 1 - args.fm_fraction)
            row["mfu"] = work / row["seconds"] / (peak * 1e12)


def table(results: dict[str, dict]) -> str:
    """Return the figures as text, one line per variant."""
    lines = [f"{'':16}{'s/step':>9}{'images/s':>10}{'ratio':>8}{'peak MB':>10}{'saved MB':>10}{'MFU':>8}"]
    for name, row in results.items():
        if "error" in row:
            lines.append(f"{name:16}{row['error']}")
            continue
        mfu = f"{row['mfu']:.1%}" if "mfu" in row else "-"
        lines.append(
            f"{name:16}{row['seconds']:>9.4f}{row['images_per_second']:>10.1f}{row['ratio']:>8.3f}"
            f"{row['peak_bytes'] / 1e6:>10.1f}{row['saved_bytes'] / 1e6:>10.1f}{mfu:>8}"
        )
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_for(__doc__, batch=32, rounds=9)
    parser.add_argument("--fm-fraction", type=float, default=0.75, help="share of rows with r = t")
    parser.add_argument("--tf32", action="store_true", help="TF32 matrix products on a GPU")
    parser.add_argument("--mode", default="eager", choices=["eager", "compiled", "both"])
    parser.add_argument("--attention", default="fused", choices=["fused", "math"], help="of values")
    parser.add_argument("--jvp-attention", default="math", choices=["math", "flash"], help="of tangents")
    parser.add_argument("--jvp", choices=["network", "torch"], help="who differentiates (default: the network)")
    parser.add_argument("--jvp-precision", choices=["32-true", "bf16-mixed"], help="a pass of its own for the JVP")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--optimizer", action="store_true", help="fused Adam and EMA belong to the step")
    parser.add_argument("--variants", nargs="+", choices=[*GUIDANCES, "naive_none", "naive_kappa0.5"], help="only these")
    parser.add_argument("--no-naive", action="store_true", help="leave the naive form out")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for MFU; known for H100 and H200 in bfloat16")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run, print, and return the exit code."""
    args = parse(argv)
    _, device = device_of(args)
    if args.jvp == "torch" and args.jvp_attention == "flash":
        print("error: Got --jvp torch with --jvp-attention flash, expected math: torch.func.jvp uses it.", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    flops, found = forward_flops(args), {}
    try:
        bench = make_bench(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    setting = f"SiT-{args.size}/{args.patch}, latents {tuple(args.latent)}, batch {args.batch}, {args.precision}"
    print(f"{setting}, {device}, torch {torch.__version__}", file=sys.stderr if args.json else sys.stdout)
    for mode in ("eager", "compiled") if args.mode == "both" else (args.mode,):
        try:
            found[mode] = measure(bench, mode, args)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        add_mfu(found[mode], flops, args)
        if not args.json:
            print(f"\n{mode}\n{table(found[mode])}")
    ratios = {mode: {name: row.get("ratio") for name, row in rows.items() if name != "fm"} for mode, rows in found.items()}
    report = {"ratio": next(iter(ratios.values())), "ratio_by_mode": ratios, "variants": found}
    report |= {"settings": vars(args), "gmacs_per_forward": flops / 2e9, "device": device}
    report |= {"torch": torch.__version__, "python": platform.python_version()}
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
