"""Quality of generated images at each NFE, while the network trains."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from mf_lightning.callbacks.generate import LabelScheme, Stopwatch, check_nfe, find_ema, generate
from mf_lightning.metrics.extractor import Extractor
from mf_lightning.metrics.fidelity import SampleQuality
from mf_lightning.metrics.reference import Reference, compute_reference, load_reference, save_reference
from mf_lightning.pixels import ROUNDING
from mf_lightning.types import UserError

RESULTS_FILE = "sample_eval.jsonl"


class SampleEval(Callback):
    """Generate, decode and score images at each validation (and in `validate` and `test`), for each NFE and each EMA.

    Figures are logged as ``fid/nfe1``, ``fid/nfe2``, ... for the first EMA asked for, with ``/ema0.999`` or ``/raw`` behind
    for others, and appended to ``sample_eval.jsonl``, one line per evaluation, EMA and NFE, with the protocol beside them.

    Args:
        nfe: sampling steps to compare; each is one network pass; null is [1, 2].
        emas: averages to score, null meaning the raw weights; an absent list is the one that ``ema.use`` names.
        num_samples: images per evaluation; 0 turns it off. The field's FID takes 50,000.
        batch_size: images at a time on each device; no figure depends on it.
        labels: "balanced" (image i has class i mod K) or "uniform" (drawn by seed and i).
        seed: with an image's number it decides noise and label.
        extractor: torch-fidelity's name, ``inception-v3-compat`` for the field's FID, ``digits-cnn`` for the quickstart.
        extractor_weights: local file; null takes the extractor's own, which most download.
        layer: features for FID, precision and recall; null is the extractor's default.
        class_layer: class logits of an extractor that knows the data's classes, for class accuracy; null does without.
        reference: .npz of the real images' statistics; null computes them once from the training split, decoded.
    """

    def __init__(
        self,
        nfe: list[int] | None = None,
        emas: list[float | None] | None = None,
        num_samples: int = 10_000,
        batch_size: int = 250,
        labels: LabelScheme = "balanced",
        seed: int = 0,
        extractor: str = "inception-v3-compat",
        extractor_weights: str | None = None,
        layer: str | None = None,
        class_layer: str | None = None,
        reference: str | None = None,
    ) -> None:
        self.nfe = check_nfe("sample_eval.nfe", [1, 2] if nfe is None else nfe)
        if emas is not None and not emas:
            raise UserError("Got sample_eval.emas = [], expected at least one decay, or null for the raw weights.")
        if num_samples < 0 or num_samples == 1 or batch_size < 1:
            raise UserError(
                f"Got sample_eval.num_samples = {num_samples}, batch_size = {batch_size}, expected at least 2 samples (0 for "
                "no evaluation) and a batch of at least 1."
            )
        self.emas = emas
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.labels: LabelScheme = labels
        self.seed = seed
        self.extractor_name = extractor
        self.extractor_weights = extractor_weights
        self.layer = layer
        self.class_layer = class_layer
        self.reference_path = reference
        self.extractor: Extractor | None = None
        self.reference: Reference | None = None
        self.rows: list[dict[str, Any]] = []
        """Every line written by this process's run, newest last."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load extractor and reference now, so that what is missing shows at the start and not after an hour."""
        if self.num_samples == 0 or stage == "predict" or self.extractor is not None:
            return
        if trainer.datamodule.autoencoder is None:
            raise UserError(
                "Got data.autoencoder = null, expected one to make pictures for FID. Set data.autoencoder, or turn "
                "evaluation off with sample_eval.num_samples=0."
            )
        self.extractor = Extractor(
            self.extractor_name, weights=self.extractor_weights, layer=self.layer, class_layer=self.class_layer
        )
        if self.reference_path is not None:
            self.reference = load_reference(self.reference_path, self.extractor)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute reference statistics before training, where no file was given."""
        if self.extractor is None:
            return
        self.extractor.to(pl_module.device)
        if self.reference is None:
            self.reference = self._computed_reference(trainer, pl_module)

    on_validation_start = on_test_start = on_fit_start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop lines of a run that was cut off behind the checkpoint it now resumes from."""
        if trainer.is_global_zero:
            _keep_lines(Path(trainer.default_root_dir) / RESULTS_FILE, before=trainer.global_step + 1)

    def _computed_reference(self, trainer: Trainer, pl_module: LightningModule) -> Reference:
        """Decode the training split once, on the first process, and keep the statistics beside the run."""
        data = trainer.datamodule
        key = json.dumps(
            [self.extractor.name, self.extractor.layer, data.info.to_json(), data.seed, data.state_dict().get("subset")],
            sort_keys=True,
        )
        file = Path(trainer.default_root_dir) / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npz"
        if trainer.is_global_zero and not file.exists():
            batches = data.decoded_split("train", device=pl_module.device, batch_size=self.batch_size)
            images = (pixels for pixels, _ in batches)
            reference = compute_reference(self.extractor, images, source="training split, decoded")
            file.parent.mkdir(parents=True, exist_ok=True)
            aside = file.with_name(f".{file.name}")
            save_reference(aside, reference)
            aside.replace(file)
        while not file.exists():  # a barrier would give up after its timeout, and a large split takes hours
            time.sleep(0.5)
        trainer.strategy.barrier()
        return load_reference(file, self.extractor)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score; Lightning's sanity check scores nothing."""
        if not trainer.sanity_checking:
            self._evaluate_all(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score."""
        self._evaluate_all(trainer, pl_module)

    def _evaluate_all(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.extractor is None:
            return
        emas = [find_ema(trainer).use] if self.emas is None else self.emas
        file = Path(trainer.default_root_dir) / RESULTS_FILE
        if trainer.is_global_zero and trainer.state.fn == "fit":  # what an interrupted validation of this step left
            _keep_lines(file, before=trainer.global_step)
        for ema in emas:
            for num_steps in self.nfe:
                row = self._evaluate(trainer, pl_module, num_steps, ema)
                self.rows.append(row)
                suffix = "" if ema == emas[0] else "/raw" if ema is None else f"/ema{ema}"
                for name in ("fid", "class_accuracy", "precision", "recall"):
                    if row[name] is not None:
                        pl_module.log(f"{name}/nfe{row['nfe']}{suffix}", row[name], rank_zero_only=False)
                if trainer.is_global_zero:
                    _append_line(file, row)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, num_steps: int, ema: float | None) -> dict[str, Any]:
        quality = SampleQuality(self.extractor, self.reference).to(pl_module.device)
        watch = Stopwatch(pl_module.device)
        nfe = num_steps
        for images in generate(
            trainer,
            pl_module,
            torch.arange(self.num_samples),
            num_steps=num_steps,
            ema=ema,
            seed=self.seed,
            labels=self.labels,
            batch_size=self.batch_size,
        ):
            quality.update(images.pixels, images.labels, images.index)
            nfe = images.nfe
        figures = quality.compute()
        seconds = watch.seconds()
        return {
            "step": pl_module.trained_steps,
            "ema": ema,
            "nfe": nfe,
            **figures,
            "images_per_s": round(self.num_samples / seconds, 1),
            "protocol": self.protocol(trainer, ema=ema, nfe=nfe),
        }

    def protocol(self, trainer: Trainer, *, ema: float | None, nfe: int) -> dict[str, Any]:
        """Return everything that moves the figures besides the network; only equal protocols compare."""
        labels = self.labels if trainer.lightning_module.net.y_null else "none"
        return {
            "extractor": self.extractor.name,
            "layer": self.extractor.layer,
            "resize": "the extractor's own",
            "reference": self.reference.name,
            "labels": labels,
            "autoencoder": trainer.datamodule.autoencoder.id,
            "rounding": ROUNDING,
            "num_samples": self.num_samples,
            "seed": self.seed,
            "precision": str(trainer.precision),
            "ema": ema,
            "nfe": nfe,
        }


def _keep_lines(file: Path, *, before: int) -> None:
    """Drop lines of a step and later ones, and one that was cut off in the middle."""
    if not file.exists():
        return
    lines = file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < before]
    if kept != lines:
        aside = file.with_name(f".{file.name}.tmp")
        aside.write_text("".join(kept))
        aside.replace(file)


def _append_line(file: Path, row: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
