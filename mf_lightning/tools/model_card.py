"""The model card of an export: what the files are, on which data and how they were trained, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mf_lightning.metrics.protocol import METRICS
from mf_lightning.pipeline import MeanFlowPipeline
from mf_lightning.pipeline.loading import Description, beside, setting
from mf_lightning.report.runs import Row, Run, read_run
from mf_lightning.types import UserError

USE = {
    "safetensors": """\
```python
from mf_lightning.pipeline import MeanFlowPipeline
pipeline = MeanFlowPipeline.from_pretrained("{folder}")
images = pipeline({labels}seed=0, nfe={nfe})
```""",
    "diffusers": """\
Needs the package mf_lightning; the code in this folder is run.

```python
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("{folder}", custom_pipeline="{folder}", trust_remote_code=True)
images = pipe({class_labels}seed=0, num_inference_steps={nfe}).images
```""",
    "onnx": """\
```python
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession("{folder}/image.onnx")
noise = np.random.default_rng(0).standard_normal((1, {shape}), dtype=np.float32)
(image,) = session.run(None, {{"noise": noise{label}}})
pixels = np.clip(127.5 * image + 128, 0, 255).astype(np.uint8)  # (1, channels, height, width)
```

`generator.onnx` gives the scaled latent instead of the picture. The batch is free.""",
    "torch": """\
```python
import torch
generator = torch.export.load("{folder}/image.pt2").module()
image = generator(torch.randn(1, {shape}){tensor})  # pixels in [-1, 1]
```

`generator.pt2` gives the scaled latent instead of the picture. The batch is free.""",
}
BY_EULER = '50, sampler="euler"'
"""How a flow-matching network is called, which cannot jump."""


def write_card(
    pipeline: MeanFlowPipeline, folder: Path, *, checkpoint: Path, to: str, name: str, checks: dict[str, float]
) -> None:
    """Write README.md into an export.

    Args:
        pipeline: what was exported.
        folder: of the export.
        checkpoint: where the weights came from; the run's files are looked for beside it.
        to: kind of export.
        name: of the model.
        checks: largest difference from torch by file, for graphs.
    """
    run = find_run(checkpoint)
    blocks = [
        _head(pipeline, to),
        f"# {name}",
        _what(pipeline.description),
        "## Use",
        _use(pipeline, to, name),
        *([_checks(checks)] if checks else []),
        "## Data",
        _data(pipeline, run),
        "## Training",
        _training(pipeline, run),
        "## Figures",
        _figures(pipeline, run),
    ]
    (folder / "README.md").write_text("\n\n".join(blocks) + "\n")


def find_run(checkpoint: Path) -> Run | None:
    """Return the run that a checkpoint is part of; None where no files of it lie beside."""
    for file in ("sample_eval.jsonl", "metrics.csv", "config.yaml"):
        found = beside(checkpoint, file)
        if found is not None:
            try:
                return read_run(found.parent, found.parent.name)
            except UserError:
                break
    return None


def _elsewhere(told: Description) -> bool:
    """Tell whether the weights were imported, so that the settings of the run beside them are not theirs."""
    return told.origin is not None and told.origin.get("container") != "snapshots"


def _what(told: Description) -> str:
    meanflow = "[MeanFlow](https://arxiv.org/abs/2505.13447)"
    if told.flow_matching:
        what = f"Images in many network passes: a flow-matching network, which {meanflow} has not yet taught to jump"
    else:
        what = f"Images in one network pass: a {meanflow} generator"
    if told.origin is None:
        return f"{what}, trained with mf_lightning."
    if _elsewhere(told):
        return f"{what}. Its weights were imported with mf_lightning from `{told.origin['source']}`."
    return f"{what}. Its weights were put together with mf_lightning from {told.origin['source']}."


def _head(pipeline: MeanFlowPipeline, to: str) -> str:
    kind = "unconditional-image-generation" if not pipeline.num_classes else "image-generation"
    library = "diffusers" if to == "diffusers" else "mf_lightning"
    tags = ["flow-matching"] if pipeline.description.flow_matching else ["meanflow", "one-step"]
    return "\n- ".join([f"---\nlibrary_name: {library}\ntags:", *tags, kind]) + "\n---"


def _use(pipeline: MeanFlowPipeline, to: str, name: str) -> str:
    labelled = bool(pipeline.num_classes)
    return USE[to].format(
        folder=name,
        nfe=BY_EULER if pipeline.description.flow_matching else 1,
        labels="labels=[0], " if labelled else "",
        class_labels="class_labels=[0], " if labelled else "",
        label=', "label": np.array([0])' if labelled else "",
        tensor=", torch.tensor([0])" if labelled else "",
        shape=", ".join(map(str, pipeline.description.data.latent_shape)),
    )


def _checks(checks: dict[str, float]) -> str:
    told = ", ".join(f"`{file}` {worst:.1e}" for file, worst in checks.items())
    return f"Largest difference from PyTorch, checked on the files as written: {told}."


def _data(pipeline: MeanFlowPipeline, run: Run | None) -> str:
    data = pipeline.description.data
    names = pipeline.class_names
    classes = f"{len(names)}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else "none, unconditional"
    config = run.config if run and not _elsewhere(pipeline.description) else None
    path = setting(config, "data", "init_args", "path")
    noted = Path(str(path)).name if path else _kind(setting(config, "data")) or "not told"
    rows = {
        "data set": noted,
        "classes": classes,
        "pictures": f"{data.image_size} x {data.image_size}",
        "latents": f"{' x '.join(map(str, data.latent_shape))}, (z - {data.shift:g}) x {data.scale:g}",
        "autoencoder": f"`{data.autoencoder}`",
    }
    return _table(rows)


def _training(pipeline: MeanFlowPipeline, run: Run | None) -> str:
    told = pipeline.description
    net = told.net["init_args"]
    parameters = sum(p.numel() for p in pipeline.net.parameters()) / 1e6
    rows = {
        "network": f"{_kind(told.net)}, {parameters:.1f} M parameters: "
        + ", ".join(f"{key} {value}" for key, value in net.items() if key not in ("latent_shape", "num_classes")),
        "weights": f"{told.name}, step {told.step:,}",
    }
    if _elsewhere(told):
        rows["weights"] = f"{told.imported}, imported as `{told.origin.get('format', 'not told')}`"
        return _table(rows) + "\n\nThe settings are not told: the weights were imported."
    config = run.config if run else None
    if config is None:
        return _table(rows) + "\n\nThe settings are not told: no config.yaml lay beside the checkpoint."
    loss = setting(config, "model", "loss", "init_args")
    optimizer = setting(config, "model", "optimizer")
    rows |= {
        "loss": _flat(loss, ("fm_fraction", "guidance", "guidance_schedule", "weight", "times", "label_drop")),
        "optimizer": f"{_kind(optimizer)}, " + _flat(setting(optimizer, "init_args"), ("lr", "betas", "weight_decay")),
        "schedule": _kind(setting(config, "model", "lr_schedule")) or "constant rate",
        "batch": str(setting(config, "data", "init_args", "batch_size")),
        "precision": str(setting(config, "trainer", "precision") or "32-true"),
        "seed": str(setting(config, "seed_everything")),
    }
    return _table(rows)


def _figures(pipeline: MeanFlowPipeline, run: Run | None) -> str:
    told = pipeline.description
    if run is None or not run.rows:
        return "None are known: no sample_eval.jsonl with figures lay beside the checkpoint."
    rows = [row for row in run.rows if row.step == told.step and _of(row, told)]
    if not rows:
        steps = ", ".join(f"{step:,}" for step in sorted({row.step for row in run.rows}))
        return f"None of these weights ({told.name}, step {told.step:,}): the run was scored at the steps {steps}."
    blocks = []
    for protocol in dict.fromkeys(row.protocol_id for row in rows):
        same = [row for row in rows if row.protocol_id == protocol]
        blocks += [_scores(same), f"Protocol `{protocol}`:", _table({k: str(v) for k, v in same[0].protocol.items()})]
    return "\n\n".join(blocks)


def _of(row: Row, told: Description) -> bool:
    """Tell whether figures are those of the exported weights: of an average or the raw ones, or of imported ones by name."""
    if row.protocol.get("weights") != told.imported:  # older rows lack it, and are of a run's own weights
        return False
    if told.imported is not None:
        return row.ema is None
    try:
        return row.ema == (None if told.weights == "raw" else float(told.weights.removeprefix("ema ")))
    except ValueError:  # an average that is named otherwise, which evaluation never scores
        return False


def _scores(rows: list[Row]) -> str:
    shown = [metric for metric in METRICS if any(metric.name in row.figures for row in rows)]
    lines = [
        "| NFE | " + " | ".join(metric.title for metric in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for row in sorted(rows, key=lambda row: row.nfe):
        cells = [f"{row.figures[m.name]:.4g}" if m.name in row.figures else "-" for m in shown]
        lines.append(f"| {row.nfe} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _kind(part: Any) -> str:
    return str(setting(part, "class_path") or "").rpartition(".")[2]


def _flat(settings: Any, names: tuple[str, ...]) -> str:
    """Return a few settings in one line, parts by the name of their class."""
    told = []
    for name in names:
        value = setting(settings, name)
        if isinstance(value, Mapping) and "class_path" in value:
            value = f"{_kind(value)} {json.dumps(value.get('init_args', {}))}"
        elif isinstance(value, Mapping | list):
            value = json.dumps(value)
        if value is not None:
            told.append(f"{name} {value}")
    return ", ".join(told) or "not told"


def _table(rows: dict[str, str]) -> str:
    cells = [f"| {key} | {str(value).replace('|', '/')} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *cells])
