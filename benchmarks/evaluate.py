"""Images per second of an evaluation, stage by stage, and the seconds of a whole one.

python benchmarks/evaluate.py                                  # the quickstart's validation: 2,000 digits at NFE 1 and 2
python benchmarks/evaluate.py --config configs/experiment/smoke.yaml --images 200 --nfe 1 2 4

The network is that of the recipe with its first weights: the time does not depend on them. Stages are timed one after the
other, batch by batch; the whole evaluation is the callback's own, in which they overlap on a GPU. The last line on stdout is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mf_lightning import draws
from mf_lightning.callbacks import SampleEval
from mf_lightning.callbacks.generate import Stopwatch, choose_labels
from mf_lightning.cli import load
from mf_lightning.draws import Stream
from mf_lightning.flow.sampler import sample, time_grid
from mf_lightning.types import UserError


class Stages(Callback):
    """Times each stage of an evaluation at the end of a validation, which must have one."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.rates: dict[str, float] = {}
        """Images per second."""

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure."""
        evaluation = next(callback for callback in trainer.callbacks if isinstance(callback, SampleEval))
        net, data, size = pl_module.net, trainer.datamodule, evaluation.batch_size
        net.eval()
        taken: dict[str, list[float]] = {}

        def timed(name: str, call: Callable[[], object]) -> object:
            watch = Stopwatch(pl_module.device)
            result = call()
            taken.setdefault(name, []).append(watch.seconds())
            return result

        with trainer.precision_plugin.forward_context():
            for batch in range(self.batches + 1):
                rows = torch.arange(batch * size, (batch + 1) * size, device=pl_module.device)
                how = {"step": 0, "rows": rows, "shape": data.latent_spec.shape}
                noise = timed("noise", lambda how=how: draws.normal(0, Stream.SAMPLE_NOISE, **how))
                y = choose_labels(evaluation.labels, rows, num_classes=net.y_null or 0, seed=evaluation.seed)
                for steps in evaluation.nfe:
                    grid = time_grid(steps)
                    how = {"y": y, "grid": grid, "sampler": evaluation.sampler}
                    latents = timed(f"nfe{steps}", lambda x=noise, how=how: sample(pl_module.generator, x, **how))
                pixels = timed("decode", lambda x=latents: data.decode(x))
                timed("extract", lambda x=pixels: evaluation.extractor.features(x))
        self.rates = {name: size / statistics.median(values[1:]) for name, values in taken.items()}


class Whole(Callback):
    """Times everything that happens between two of its kind in a trainer's list."""

    def __init__(self, first: Whole | None = None) -> None:
        self.first = first
        self.at = 0.0
        self.seconds = 0.0

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time."""
        self.at = time.perf_counter()
        if self.first is not None:
            self.seconds = self.at - self.first.at


def measure(args: argparse.Namespace) -> dict[str, float | int | str]:
    """Return rates and seconds of one evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        configs = [option for config in args.config for option in ("--config", config)]
        run = load(
            [*configs, f"--trainer.default_root_dir={folder}", f"--sample_eval.num_samples={args.images}",
             f"--sample_eval.nfe={args.nfe}", "--sample_eval.emas=[null]", "--sample_grid.rows=0",
             "--trainer.limit_val_batches=1", "--trainer.logger=false", "--trainer.enable_progress_bar=false",
             "--trainer.enable_model_summary=false", *args.options]
        )  # fmt: skip
        trainer = run.trainer
        before, stages = Whole(), Stages(args.batches)
        after, place = Whole(before), next(i for i, c in enumerate(trainer.callbacks) if isinstance(c, SampleEval))
        evaluation = trainer.callbacks[place]
        trainer.callbacks[place : place + 1] = [before, evaluation, after, stages]
        warnings.filterwarnings("ignore", message=".*no logger configured")  # meant so: figures go nowhere here
        trainer.validate(run.model, run.datamodule, verbose=False)
    return {
        "images": args.images,
        "nfe": " ".join(map(str, args.nfe)),
        "metrics": " ".join(evaluation.chosen),
        "validation_s": after.seconds,
        **{f"{name}_images_per_s": rate for name, rate in stages.rates.items()},
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", help="recipe; given again, a later one wins")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--nfe", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, default=5, help="timed batches of each stage, after one that does not count")
    parser.add_argument("--json", action="store_true", help="print the JSON line only, no table")
    parser.add_argument("options", nargs="*", metavar="--group.option=value", help="options of the recipe, behind `--`")
    args = parser.parse_args(arguments)
    if args.images < 2 or args.batches < 1 or min(args.nfe) < 1:
        parser.error("Got sizes that do not fit, expected at least 2 images, 1 batch, and numbers of steps of at least 1.")
    args.config = args.config or ["configs/experiment/quickstart.yaml"]
    return args


def main() -> None:
    """Measure and print."""
    args = parse()
    try:
        found = measure(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if not args.json:
        for name, value in found.items():
            if name.endswith("_images_per_s"):
                print(f"{name.removesuffix('_images_per_s'):<12}{value:>12,.0f} images/s")
        print(f"{found['images']:,} images at NFE {found['nfe']}, {found['metrics']}: {found['validation_s']:.1f} s")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
