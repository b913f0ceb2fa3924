"""One image in one pass: torch eager, torch.compile and ONNX in turn, in one process."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mf_lightning.autoencoders import KLAutoencoder
from mf_lightning.flow.passes import check_compiler
from mf_lightning.tools.export_graphs import OPSET, OneStep
from mf_lightning.types import UserError


def latencies(args: argparse.Namespace, net: nn.Module, autoencoder: KLAutoencoder | None, device: torch.device) -> dict:
    """Return milliseconds of one image, and their ratio to eager's, by mode.

    Args:
        args: the benchmark's.
        net: the generator, on the device.
        autoencoder: decodes behind it; None gives the latent.
        device: of torch; ONNX runs on the CPU beside a CPU only.
    """
    scale = {} if autoencoder is None else {"scale": autoencoder.scale, "shift": autoencoder.shift}
    module = OneStep(net, None if autoencoder is None else autoencoder.decoder().to(device), **scale).eval()
    noise, label = torch.randn(1, *args.latent, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    calls: dict[str, Callable[[], object]] = {"eager": lambda: module(noise, label)}
    if not args.no_compile:
        check_compiler(device)
        compiled = torch.compile(module, fullgraph=True, dynamic=False)
        calls["compiled"] = lambda: compiled(noise, label)
    with tempfile.TemporaryDirectory() as folder:
        if device.type == "cpu" and not args.no_onnx:
            calls["onnx"] = onnx_call(module, noise, label, Path(folder) / "model.onnx")
        seconds = in_turn(calls, args.rounds, device)
    return {name: {"latency_ms": 1000 * taken, "ratio": taken / seconds["eager"]} for name, taken in seconds.items()}


def onnx_call(module: nn.Module, noise: Tensor, label: Tensor, file: Path) -> Callable[[], object]:
    """Return a call of the module in onnxruntime, with as many threads as torch has.

    Raises:
        UserError: the packages are not there.
    """
    try:
        import onnxruntime

        program = torch.onnx.export(module, (noise, label), dynamo=True, opset_version=OPSET, verbose=False)
    except ImportError as error:
        raise UserError(
            f"Got no ONNX ({error}), expected its packages: pip install 'mf_lightning[export]', or --no-onnx"
        ) from error
    size = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    program.save(str(file), external_data=size > 1e9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    values = dict(zip((i.name for i in session.get_inputs()), (noise.numpy(), label.numpy()), strict=True))
    return lambda: session.run(None, values)


def in_turn(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Return each call's median wall time; every round times all of them, so that they share what the machine does besides."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}
