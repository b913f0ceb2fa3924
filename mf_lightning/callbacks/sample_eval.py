"""Quality of generated images at each NFE, while the network trains."""

from __future__ import annotations

import hashlib
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from mf_lightning.callbacks.curves import Home, append_line, find_home, keep_lines, log_figures, note_protocol
from mf_lightning.callbacks.generate import LabelScheme, Stopwatch, find_ema, generate
from mf_lightning.callbacks.scoring import Beside
from mf_lightning.flow.sampler import AverageSampler, Sampler, check_nfe
from mf_lightning.metrics.extractor import Extractor
from mf_lightning.metrics.fidelity import NEED_FEATURES, SampleQuality, bias_of_few, kid_subset_size, possible_metrics
from mf_lightning.metrics.protocol import NAMES, protocol_id
from mf_lightning.metrics.reference import Reference, ReferenceSums, identity, load_reference, save_reference
from mf_lightning.pixels import ROUNDING
from mf_lightning.types import UserError

RESULTS_FILE = "sample_eval.jsonl"
TIMED = (1, 2, 3)
"""Batches whose seconds are measured, the first of which compiles and warms up; with a single batch that one is."""


class SampleEval(Callback):
    """Generate, decode and score images at each validation (and in `validate` and `test`), for each NFE and each EMA.

    Figures are logged as ``fid/nfe1``, ``fid/nfe2``, ... for the first EMA asked for, with ``/ema0.999`` or ``/raw`` behind
    for others, and appended to ``sample_eval.jsonl``, one line per evaluation, EMA and NFE, with the protocol beside them.
    All numbers of steps share noise, labels and reference.

    Args:
        metrics: fid, sfid, kid, fd_dinov2, inception_score, precision, recall, class_accuracy; null is all that extractor,
            layers and reference allow, and one line says which are not.
        nfe: sampling steps to compare; each is one network pass; null is [1, 2].
        emas: averages to score, null meaning the raw weights; an absent list is the one that ``ema.use`` names.
        num_samples: images per evaluation; 0 turns it off. The field's FID takes 50,000.
        batch_size: images at a time on each device; no figure depends on it.
        labels: "balanced" (image i has class i mod K) or "uniform" (drawn by seed and i).
        seed: with an image's number it decides noise and label.
        extractor: torch-fidelity's name, ``inception-v3-compat`` for the field's FID, ``digits-cnn`` for the quickstart.
        extractor_weights: local file; null takes the extractor's own, which most download.
        layer: features for FID, KID, precision and recall; null is the extractor's default.
        class_layer: class logits of an extractor that knows the data's classes, for class accuracy; null does without.
        dinov2: extractor of fd_dinov2, for example ``dinov2-vit-l-14``; null does without.
        dinov2_weights: local file of its weights, as facebookresearch/dinov2 publishes them; null downloads them.
        reference: .npz of the real images' statistics; null computes them once from the training split, decoded.
        sampler: how a jump is made; null is AverageSampler, MeanFlow's; EulerSampler is for flow matching.
    """

    def __init__(
        self,
        metrics: list[str] | None = None,
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
        dinov2: str | None = None,
        dinov2_weights: str | None = None,
        reference: str | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        unknown = [name for name in metrics or [] if name not in NAMES]
        if unknown or metrics == []:
            raise UserError(
                f"Got sample_eval.metrics = {metrics}, expected some of {', '.join(NAMES)}, or null for all that are possible."
            )
        self.metrics = metrics
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
        self.sampler = sampler or AverageSampler()
        self.dinov2_name = dinov2
        self.dinov2_weights = dinov2_weights
        self.extractor: Extractor | None = None
        self.dinov2: Extractor | None = None
        self.reference: Reference | None = None
        self.chosen: list[str] = []
        """Figures that are computed, once the reference is known."""
        self.first: float | None = None
        """Average whose figures are watched without a suffix."""
        self.home: Home | None = None
        """Protocol and average that the run's curves began with; figures of others get keys of their own."""
        self.rows: list[dict[str, Any]] = []
        """Every line written by this process's run, newest last."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load extractor and reference now, so that what is missing shows at the start and not after an hour."""
        if self.num_samples == 0 or stage == "predict" or self.extractor is not None:
            return
        if stage == "fit" and (unknown := {*(self.emas or []), None} - {*find_ema(trainer).decays, None}):
            raise UserError(
                f"Got sample_eval.emas = {self.emas} with {sorted(unknown)}, which are not kept, expected some of ema.decays = "
                f"{find_ema(trainer).decays} and null for the raw weights. Change one of the two."
            )
        if trainer.datamodule.autoencoder is None:
            raise UserError(
                "Got data.autoencoder = null, expected one to make pictures for FID. Set data.autoencoder, or turn "
                "evaluation off with sample_eval.num_samples=0."
            )
        self._load_extractors()
        if self.reference_path is not None:
            cache = Path(trainer.default_root_dir)
            self.reference = load_reference(self.reference_path, self.extractor, dinov2=self.dinov2, cache=cache)

    def _load_extractors(self) -> None:
        name, asked = self.extractor_name, self.metrics
        spatial = Extractor.provides_spatial(name) if asked is None else "sfid" in asked
        scored = asked is None or "inception_score" in asked
        self.extractor = Extractor(
            name,
            weights=self.extractor_weights,
            layer=self.layer,
            class_layer=self.class_layer,
            score_layer=Extractor.default_score_layer(name) if scored else None,
            spatial=spatial,
        )
        if asked is not None and "fd_dinov2" in asked and self.dinov2_name is None:
            raise UserError(
                "Got fd_dinov2 in sample_eval.metrics with sample_eval.dinov2 = null, expected an extractor for it. Set "
                "sample_eval.dinov2=dinov2-vit-l-14, and sample_eval.dinov2_weights to a local file."
            )
        if self.dinov2_name is not None and (asked is None or "fd_dinov2" in asked):
            self.dinov2 = Extractor(self.dinov2_name, weights=self.dinov2_weights, option="sample_eval.dinov2_weights")
        if bias := bias_of_few(self.num_samples, self.extractor, self.dinov2):
            rank_zero_warn(f"{bias} Compare such figures only with each other, or raise sample_eval.num_samples.")

    def _choose(self, *, conditional: bool) -> None:
        """Decide which figures there will be, and say which not, and why."""
        self.chosen, off = possible_metrics(
            self.metrics, self.extractor, self.reference, count=self.num_samples, conditional=conditional, dinov2=self.dinov2
        )
        reasons: dict[str, list[str]] = {}
        for name, why in off.items():
            reasons.setdefault(why, []).append(name)
        if off:
            rank_zero_info("Not scored: " + "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items()))
        if not self.chosen:
            raise UserError(
                f"Got sample_eval.metrics = {self.metrics}, none of which can be computed, expected at least one that can. "
                "Make a reference with `python -m mf_lightning reference`, or set sample_eval.num_samples=0."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute reference statistics before training, where no file was given."""
        if self.extractor is None:
            return
        self.extractor.to(pl_module.device)
        if self.dinov2 is not None:
            self.dinov2.to(pl_module.device)
        if self.reference is None:
            self.reference = self._computed_reference(trainer, pl_module)
        if not self.chosen:
            self._choose(conditional=bool(pl_module.net.y_null))
        if any(name in NEED_FEATURES for name in self.chosen):
            _ = self.reference.features  # of a file's images: made now, and not after an hour

    on_validation_start = on_test_start = on_fit_start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop lines of a run that was cut off behind the checkpoint it now resumes from."""
        file = Path(trainer.default_root_dir) / RESULTS_FILE
        if trainer.is_global_zero:
            keep_lines(file, before=trainer.global_step + 1)
        self.home = trainer.strategy.broadcast(find_home(file))

    def _computed_reference(self, trainer: Trainer, pl_module: LightningModule) -> Reference:
        """Decode the training split once, each process its share, and keep the statistics beside the run."""
        data = trainer.datamodule
        of_data = [data.info.to_json(), data.seed, data.subset.describe(), data.autoencoder.id]
        extractors = [identity(self.extractor), self.extractor.spatial, self.dinov2 and identity(self.dinov2)]
        key = hashlib.sha256(json.dumps([extractors, of_data], sort_keys=True).encode()).hexdigest()[:12]
        file = Path(trainer.default_root_dir) / f"reference-{key}.npz"
        if not trainer.strategy.broadcast(file.exists()):
            sums = ReferenceSums(self.extractor, dinov2=self.dinov2, shared=True)
            share = {"rank": trainer.global_rank, "world_size": trainer.world_size}
            for pixels, index in data.decoded_split("train", device=pl_module.device, batch_size=self.batch_size, **share):
                sums.update(pixels, index)
            reference = sums.reference({"source": "training split, decoded"})
            if trainer.is_global_zero:
                file.parent.mkdir(parents=True, exist_ok=True)
                save_reference(file, reference)
            del sums, reference  # features in memory twice would be too much
            trainer.strategy.barrier()
        reference = load_reference(file, self.extractor, dinov2=self.dinov2)
        reference.name = f"training split, decoded, {key}"  # what it is of: its file's bytes hold a time, and last digits
        return reference

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
        self.first = emas[0]
        file = Path(trainer.default_root_dir) / RESULTS_FILE
        if trainer.is_global_zero and trainer.state.fn == "fit":  # what an interrupted validation of this step left
            keep_lines(file, before=trainer.global_step)
        for ema in emas:
            for row in self._evaluate(trainer, pl_module, ema):
                if row["protocol_id"] not in {earlier["protocol_id"] for earlier in self.rows}:
                    note_protocol(trainer, row)
                self.rows.append(row)
                home = self.home if trainer.state.fn == "fit" else None
                log_figures(pl_module, row, first=self.first, home=home)
                if trainer.is_global_zero:
                    append_line(file, row)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, ema: float | None) -> list[dict[str, Any]]:
        """Return one row per number of steps."""
        quality = {
            steps: SampleQuality(self.chosen, self.num_samples, self.extractor, self.reference, dinov2=self.dinov2)
            for steps in self.nfe
        }
        nfe, seconds = dict(zip(self.nfe, self.nfe, strict=True)), {steps: [] for steps in self.nfe}
        watch = Stopwatch(pl_module.device)
        with Beside(pl_module.device) as scoring:

            def timed(batch: int) -> bool:
                if batch not in TIMED and self.num_samples > self.batch_size * trainer.world_size:
                    return False
                scoring.wait()
                return True

            for images in generate(
                trainer,
                pl_module,
                torch.arange(self.num_samples),
                num_steps=self.nfe,
                ema=ema,
                seed=self.seed,
                labels=self.labels,
                batch_size=self.batch_size,
                timed=timed,
                sampler=self.sampler,
            ):
                update = quality[images.num_steps].update
                scoring.do(partial(update, images.pixels, images.labels, images.index))
                nfe[images.num_steps] = images.nfe
                if images.seconds_per_image is not None:
                    seconds[images.num_steps].append(images.seconds_per_image)
                    scoring.wait()  # the next number of steps is timed as well
        figures = {steps: quality[steps].compute() for steps in self.nfe}
        rate = round(self.num_samples * len(self.nfe) / watch.seconds(), 1)
        rows = []
        for steps in self.nfe:
            protocol = self.protocol(trainer, ema=ema, nfe=nfe[steps])
            rows.append(
                {
                    "step": pl_module.trained_steps,
                    "stage": trainer.state.fn.value,
                    "ema": ema,
                    "nfe": nfe[steps],
                    **figures[steps],
                    "images_per_s": rate,
                    "seconds_per_image": statistics.median(seconds[steps]) if seconds[steps] else None,
                    "protocol": protocol,
                    "protocol_id": protocol_id(protocol),
                }
            )
        return rows

    def protocol(self, trainer: Trainer, *, ema: float | None, nfe: int) -> dict[str, Any]:
        """Return everything that moves the figures besides the network; only equal protocols compare."""
        labels = self.labels if trainer.lightning_module.net.y_null else "none"
        return {
            "weights": trainer.lightning_module.imported,
            "extractor": self.extractor.name,
            "extractor_weights": identity(self.extractor)["weights"],
            "layer": self.extractor.layer,
            "resize": "the extractor's own",
            "reference": self.reference.name,
            "labels": labels,
            "autoencoder": trainer.datamodule.autoencoder.id,
            "rounding": ROUNDING,
            "num_samples": self.num_samples,
            "seed": self.seed,
            "precision": str(trainer.precision),
            "sampler": self.sampler.name,
            "kid_subset_size": kid_subset_size(self.num_samples, self.reference) if "kid" in self.chosen else None,
            "dinov2": f"{self.dinov2.name}@{identity(self.dinov2)['weights']}" if "fd_dinov2" in self.chosen else None,
            "class_layer": self.class_layer,
            "ema": ema,
            "nfe": nfe,
        }
