"""The last lines of a run: what the figures were and where everything is, the report last."""

from __future__ import annotations

from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from mf_lightning.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from mf_lightning.callbacks.csv_log import MetricsCSV
from mf_lightning.callbacks.run_record import RunRecord
from mf_lightning.callbacks.sample_eval import RESULTS_FILE, SampleEval
from mf_lightning.report import write_report


class RunSummary(Callback):
    """Print figures and places at the end of `fit`, `validate` and `test`, on the first process; keep ``run.json``.

    Args:
        report: write ``report.html`` at the end of `fit`, if figures were measured. One that fails is named and stops nothing.
    """

    def __init__(self, report: bool = True) -> None:
        self.report = report
        self._record = RunRecord()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the run's clock."""
        self._record.begin()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write with what and on what the run is trained."""
        if trainer.is_global_zero and not trainer.fast_dev_run:
            self._record.start(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write how far the run came."""
        self._record.update(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print figures, grids, metrics, checkpoints and the report."""
        if trainer.is_global_zero and not trainer.fast_dev_run:
            self._record.update(trainer, ended=True)
            root = Path(trainer.default_root_dir)
            places = {"grids": root / "grids", "figures": root / RESULTS_FILE, "curves": root / "metrics.csv"}
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, LastCheckpoint):
                    places["checkpoint"] = callback.path
                elif isinstance(callback, BestCheckpoint) and callback.best_model_path:
                    places[f"best {callback.monitor}"] = Path(callback.best_model_path)
            last = self._report(trainer, root) if self.report else []
            print("\n".join(["", *_figures(trainer), *_listing(places), *last]))

    def _report(self, trainer: Trainer, root: Path) -> list[str]:
        """Write the report and return the line that names it, or why there is none."""
        if not (root / RESULTS_FILE).is_file():
            return []
        try:
            for logger in trainer.loggers:
                if isinstance(logger, MetricsCSV):
                    logger.save()
            return _listing({"report": write_report([root], png=False)[0]})
        except Exception as error:  # a page about a run is no reason to lose the run
            return [f"  {'report:':<15} none, {type(error).__name__}: {' '.join(str(error).split())}"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print figures after `validate`; inside `fit` write how far the run is."""
        if trainer.is_global_zero and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._record.update(trainer)
        if trainer.is_global_zero and trainer.state.fn == "validate":
            print("\n".join(_figures(trainer)))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print figures after `test`."""
        if trainer.is_global_zero:
            print("\n".join(_figures(trainer)))


def _figures(trainer: Trainer) -> list[str]:
    rows = [row for callback in trainer.callbacks if isinstance(callback, SampleEval) for row in callback.rows]
    if not rows:
        return []
    newest = [row for row in rows if row["step"] == rows[-1]["step"]]
    protocol = newest[-1]["protocol"]
    columns = [name for name in ("fid", "class_accuracy", "precision", "recall") if newest[0][name] is not None]
    title = f"Step {newest[-1]['step']}, {protocol['num_samples']:,} images, {protocol['extractor']}:"
    head = f"  {'NFE':>4} {'EMA':>8} " + " ".join(f"{name:>15}" for name in columns)
    lines = [
        f"  {row['nfe']:>4} {'raw' if row['ema'] is None else row['ema']:>8} "
        + " ".join(f"{row[name]:>15.4f}" for name in columns)
        for row in newest
    ]
    known = [callback for callback in trainer.callbacks if isinstance(callback, SampleEval)]
    own = known[0].reference.about.get("reconstruction_fid") if known and known[0].reference else None
    note = [] if own is None else [f"  FID of the autoencoder's own reconstructions: {own:.4f}"]
    return [title, head, *lines, *note]


def _listing(places: dict[str, Path]) -> list[str]:
    there = {name: path for name, path in places.items() if path.exists()}
    return [f"  {name + ':':<15} {_short(path)}" for name, path in there.items()]


def _short(path: Path) -> Path:
    """Return a path relative to the working directory where it lies below it."""
    path, here = path.absolute(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
