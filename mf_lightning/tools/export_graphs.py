"""The one-step generator as a graph: noise and label => latent, or => picture; ONNX and torch.export, checked as written."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn

from mf_lightning.flow.sampler import jump
from mf_lightning.pipeline import MeanFlowPipeline
from mf_lightning.types import UserError

TOLERANCE = 1e-4
"""Largest difference from torch, in latents of about unit size and pixels in [-1, 1]."""
CHECKED_BATCHES = (1, 2, 5)
OPSET = 18
LARGEST_FILE = 1_900_000_000
"""Bytes of weights above which an ONNX file keeps them beside itself: protobuf ends at 2 GB."""


class OneStep(nn.Module):
    """``z_0 = z_1 - u(z_1, 0, 1 | y)``, and its picture where there is a decoder.

    Args:
        net: average velocity.
        decoder: unscaled latents => pixels; None gives the scaled latent.
        scale, shift: of the latents.
    """

    def __init__(self, net: nn.Module, decoder: nn.Module | None = None, *, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.net = net
        self.decoder = decoder
        self.scale, self.shift = scale, shift

    def forward(self, noise: Tensor, label: Tensor | None = None) -> Tensor:
        """Return latents, (B, C, h, w), or pixels, nominally in [-1, 1], (B, c, H, W), of noise and labels, (B,) int64."""
        latent = jump(self.net, noise, t=1.0, r=0.0, y=label)
        return latent if self.decoder is None else self.decoder(latent / self.scale + self.shift)


def one_step(pipeline: MeanFlowPipeline, *, image: bool) -> OneStep:
    """Return the generator of a pipeline as one module, in float32 on the CPU."""
    data = pipeline.description.data
    decoder = pipeline.autoencoder.decoder() if image else None
    net = pipeline.to("cpu", torch.float32).net
    return OneStep(net, decoder, scale=data.scale, shift=data.shift).eval().requires_grad_(False)


def inputs(pipeline: MeanFlowPipeline, count: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Return noise, and labels where there are classes, by the names that graphs know."""
    noise, y = pipeline.request(n=count, seed=seed)
    return {"noise": noise} if y is None else {"noise": noise, "label": y}


def export_torch(pipeline: MeanFlowPipeline, file: Path, *, image: bool) -> float:
    """Write a ``torch.export`` program for any batch; return its largest difference from the pipeline.

    Raises:
        UserError: torch cannot express it, or it differs by more than ``TOLERANCE``.
    """
    program = _program(pipeline, one_step(pipeline, image=image))
    torch.export.save(program, file, extra_files={"mf_lightning.json": _metadata(pipeline, image)["mf_lightning"]})
    written = torch.export.load(file).module()
    return _checked(pipeline, lambda **values: written(*values.values()), image=image, file=file)


def export_onnx(pipeline: MeanFlowPipeline, file: Path, *, image: bool, opset: int | None = None) -> float:
    """Write an ONNX model for any batch; return onnxruntime's largest difference from the pipeline.

    Raises:
        UserError: torch, ONNX or the opset cannot express it, or it differs by more than ``TOLERANCE``.
        ImportError: the packages are not there.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX needs packages ({error}): pip install 'mf_lightning[export]'") from error

    module, wanted = one_step(pipeline, image=image), OPSET if opset is None else opset
    names, traced = inputs(pipeline, 1), _program(pipeline, module)  # what torch itself cannot express is no fault of ONNX
    try:
        with _quiet():
            program = torch.onnx.export(
                traced,
                dynamo=True,
                opset_version=wanted,
                input_names=list(names),
                output_names=["image" if image else "latent"],
                dynamic_shapes={name: {0: "batch"} for name in names},  # the traced program has them, but not their names
                verbose=False,
            )
    except Exception as error:
        raise _not_onnx(opset, error) from error
    got = program.model.opset_imports.get("")
    if got != wanted:
        raise _not_onnx(wanted, ValueError(f"{_lacking(program, wanted)}; opset {got} can"))
    program.model.metadata_props.update(_metadata(pipeline, image))
    size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    program.save(str(file), external_data=size > LARGEST_FILE)
    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own have no common base
        raise _not_onnx(opset, error) from error

    def run(**values: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in values.items()})[0])

    return _checked(pipeline, run, image=image, file=file)


def _program(pipeline: MeanFlowPipeline, module: OneStep) -> torch.export.ExportedProgram:
    """Return the generator as a graph for any batch.

    Raises:
        UserError: torch cannot express it.
    """
    values = inputs(pipeline, 2)
    batch = torch.export.Dim("batch", min=1)
    try:
        with _quiet():
            return torch.export.export(module, tuple(values.values()), dynamic_shapes={name: {0: batch} for name in values})
    except Exception as error:  # torch raises many kinds, and what a network raises while it is traced
        raise UserError(
            f"Got a network that torch.export cannot make a graph of ({_short(error)}), expected one whose forward pass is the "
            "same for any batch (z_t.shape[0], not len(z_t); no branch on values). Mend it, or use --to safetensors."
        ) from error


def _metadata(pipeline: MeanFlowPipeline, image: bool) -> dict[str, str]:
    told = {**pipeline.description.plain(), "output": "pixels in [-1, 1]" if image else "scaled latent"}
    return {"mf_lightning": json.dumps(told)}


@torch.no_grad()
def _checked(pipeline: MeanFlowPipeline, run: Callable[..., Tensor], *, image: bool, file: Path) -> float:
    """Return the largest difference over several batch sizes from the pipeline's own network and decoder."""
    data, worst = pipeline.description.data, 0.0
    for count in CHECKED_BATCHES:
        values = inputs(pipeline, count, seed=1)
        expected = jump(pipeline.net, values["noise"], t=1.0, r=0.0, y=values.get("label"))
        if image:
            expected = pipeline.autoencoder.to(expected.device).decode(expected / data.scale + data.shift)
        found = run(**values)
        if found.shape != expected.shape:
            raise UserError(f"Got {tuple(found.shape)} from {file.name}, expected {tuple(expected.shape)}. It was not kept.")
        worst = max(worst, float((found - expected).abs().max()))
    if not worst <= TOLERANCE:
        raise UserError(
            f"Got an output of {file.name} that differs from torch by {worst:.1e}, expected at most {TOLERANCE:.0e}. It was "
            "not kept; try another version of torch or onnxruntime."
        )
    return worst


def _lacking(program: torch.onnx.ONNXProgram, opset: int) -> str:
    """Return why a model was not turned into an opset: it is not known yet, or lacks some of the model's operators."""
    from onnx import defs

    newest = defs.onnx_opset_version()
    if opset > newest:
        return f"the newest that the package onnx knows is {newest}"
    found = []
    for name in sorted({node.op_type for node in program.model.graph}):
        try:
            defs.get_schema(name, max_inclusive_version=opset)
        except defs.SchemaError:
            found.append(name)
    return f"it has no {', '.join(found)}" if found else "its operators mean something else"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _not_onnx(opset: int | None, error: Exception) -> UserError:
    if opset is None:
        return UserError(
            f"Got a network that ONNX cannot express ({_short(error)}), expected operators that opset {OPSET} has. Give "
            "another --opset, or use --to torch."
        )
    return UserError(
        f"Got --opset {opset}, which cannot express this network ({_short(error)}), expected {OPSET} or another "
        "that this torch writes. Leave --opset out."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what exporters print, log and warn of."""
    said, level = io.StringIO(), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(said), redirect_stderr(said), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
