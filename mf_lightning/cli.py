"""The command line of training: the only room that knows YAML, recipes and how options meet."""

from __future__ import annotations

import difflib
import os
import re
import sys
import uuid
import warnings
from argparse import _SubParsersAction
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from mf_lightning.callbacks import (
    EMA,
    Heartbeat,
    LastCheckpoint,
    Liveness,
    NonFiniteGuard,
    PowerEMA,
    Preemption,
    SampleEval,
    SampleGrid,
    SampleWriter,
    SelfCheck,
    SpikeLog,
    Throughput,
    WandbLog,
)
from mf_lightning.callbacks.preemption import listen_for_good
from mf_lightning.checkpoints import LAST, newest_good
from mf_lightning.data.datamodule import LatentData
from mf_lightning.failures import end, leave
from mf_lightning.launchers import agreed, follow_launcher, meet, process_rank
from mf_lightning.module import MeanFlowModule
from mf_lightning.orphans import watch_parent
from mf_lightning.types import UserError

STRATEGIES = (
    "auto",
    "ddp",
    "lightning.pytorch.strategies.DDPStrategy",
    "lightning.pytorch.strategies.SingleDeviceStrategy",
    "mf_lightning.strategies.FSDPStrategy",
)
SUBCOMMANDS = ("fit", "validate", "test", "predict")


def configs_dir() -> Path:
    """Return the folder of shipped parts and recipes: beside the package in a checkout, inside it in a wheel.

    Raises:
        UserError: neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "base.yaml").is_file():
            return folder
    raise UserError(
        f"Got no base.yaml in {package / 'configs'} or {package.parent / 'configs'}, expected the shipped configs. "
        "Reinstall mf_lightning: without base.yaml every run would silently lose what all runs share."
    )


class MeanFlowParser(LightningArgumentParser):
    """A parser whose errors are a line or two: jsonargparse prints two screens of usage above each."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, the nearest known option, and where help is; exit with code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        got = re.search(r"does not accept option '([^']+)'|unrecognized arguments: --([\w.]+)", message)
        near = difflib.get_close_matches(got[1] or got[2], self._known_options(), n=1) if got else []
        hint = f" Did you mean '{near[0]}'?" if near else ""
        print(f"error: {message}{hint}\nAll options: {Path(sys.argv[0]).name} fit --help", file=sys.stderr)
        sys.exit(2)

    def _known_options(self) -> list[str]:
        subcommands = [a for a in self._actions if isinstance(a, _SubParsersAction)]
        parsers = [self, *(p for action in subcommands for p in action.choices.values())]
        return sorted({option.lstrip("-") for parser in parsers for option in parser._option_string_actions})


class MeanFlowCLI(LightningCLI):
    """LightningCLI with this project's callbacks as groups of options (``--ema.decays``, ``--sample_eval.nfe``, ...).

    No options are linked: a link overwrites what the user wrote and ignores a missing target, both silently. The network
    takes latent shape and class count from the data module when it is made, and refuses a class count that differs.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks that every run has."""
        parser.add_lightning_class_args(SpikeLog, "spike_log")
        parser.add_lightning_class_args(NonFiniteGuard, "guard")
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(PowerEMA, "phema")
        parser.add_lightning_class_args(SampleEval, "sample_eval")
        parser.add_lightning_class_args(SampleGrid, "sample_grid")
        parser.add_lightning_class_args(SampleWriter, "sample_writer")
        parser.add_lightning_class_args(SelfCheck, "self_check")
        parser.add_lightning_class_args(Heartbeat, "heartbeat")  # behind hooks that may hang, before one that waits
        parser.add_lightning_class_args(Preemption, "preemption")

    def _parse_ckpt_path(self) -> None:
        """Take no settings from a checkpoint: Lightning would let them win over the command line, silently."""

    def before_instantiate_classes(self) -> None:
        """Follow torchrun or SLURM; give `validate`, ... a metrics file of their own; one progress bar or none."""
        trainer = self._get(self.config, "trainer")
        follow_launcher(trainer)
        check_strategy(trainer.strategy)
        strategy = getattr(trainer.strategy, "class_path", trainer.strategy)
        if trainer.plugins is not None and not isinstance(trainer.plugins, list):
            trainer.plugins = [trainer.plugins]
        if strategy == "mf_lightning.strategies.FSDPStrategy" and trainer.precision in ("64-true", "64", 64):
            trainer.precision = None  # Lightning refuses it here as a word, and takes it as a plugin
            double = Namespace(class_path="lightning.pytorch.plugins.DoublePrecision")
            trainer.plugins = [*(trainer.plugins or []), double]
        if not any(str(getattr(plugin, "class_path", "")).endswith("CheckpointIO") for plugin in trainer.plugins or []):
            # a list of plugins replaces that of base.yaml; Lightning's own writes over the last checkpoint
            trainer.plugins = [*(trainer.plugins or []), Namespace(class_path="mf_lightning.callbacks.AtomicCheckpointIO")]
        ours, callbacks = "mf_lightning.callbacks.TrainingBar", trainer.callbacks or []
        another = any("ProgressBar" in callback.class_path for callback in callbacks)
        if trainer.enable_progress_bar is False or another:  # Lightning refuses ours beside them
            trainer.callbacks = [callback for callback in callbacks if callback.class_path != ours]
        for logger in self._get(self.config, "trainer.logger") or []:
            if self.subcommand not in (None, "fit") and logger.class_path == "mf_lightning.callbacks.MetricsCSV":
                logger.init_args.file_name = f"metrics_{self.subcommand}.csv"
            tensorboard = logger.class_path.endswith("TensorBoardLogger")
            if self.subcommand not in (None, "fit") and tensorboard and not logger.init_args.get("sub_dir"):
                logger.init_args.sub_dir = self.subcommand  # curves of their own
            if self.subcommand == "fit" and logger.class_path.endswith("WandbLogger") and not logger.init_args.get("id"):
                logger.init_args.id = self._wandb_id(Path(trainer.default_root_dir))

    def _wandb_id(self, root: Path) -> str | None:
        """Return the id of this run's W&B run: a resumed run goes on in it, a new one gets a new one."""
        if process_rank() != 0:
            return None
        file, resumed = root / "wandb_id", self._get(self.config, "ckpt_path") is not None
        if not (resumed and file.is_file() and os.path.lexists(root / "checkpoints" / LAST)):
            root.mkdir(parents=True, exist_ok=True)
            file.write_text(uuid.uuid4().hex[:8])
        return file.read_text().strip()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, and meet the other processes of a torchrun job."""
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.append(Throughput())  # behind those that write checkpoints
        if any(isinstance(logger, WandbLogger) for logger in trainer.loggers):  # behind what is logged
            parser, config = self._parser(self.subcommand), self.config.get(str(self.subcommand), self.config)
            trainer.callbacks.append(WandbLog(yaml.safe_load(parser.dump(config, skip_none=False))))
        trainer.callbacks.append(Liveness())
        meet(trainer.strategy)
        return trainer

    def before_fit(self) -> None:
        """Find what to resume; refuse to write a new run into an old one's folder."""
        root = Path(self.trainer.default_root_dir)
        folders = [c.path.parent for c in self.trainer.callbacks if isinstance(c, LastCheckpoint)]
        last = (folders[0] if folders else root / "checkpoints") / LAST
        asked = self._get(self.config_init, "ckpt_path")
        if asked in (None, "auto", "last"):
            _check_last(last)
        if asked == "last" and not last.exists():
            raise UserError(f"Got --ckpt_path=last without {last}, expected a run to resume. Leave it out to start one.")
        if asked in ("auto", "last"):
            found = agreed(str(last.resolve()) if last.exists() else None)
            what = f"Resuming from {last} ({Path(found).name})" if found else f"Nothing to resume in {root}: starting anew"
            rank_zero_info(what)
            self.config_init["fit"]["ckpt_path"] = found
        self.model.resumes = self._get(self.config_init, "ckpt_path") is not None
        if asked is None and last.exists():
            here, python = Path.cwd(), Path(sys.executable)
            command = " ".join([str(python.relative_to(here) if python.is_relative_to(here) else "python"), *sys.argv])
            raise UserError(
                f"Got a folder that already holds a run: {root}. Resume it: {command} --ckpt_path=last   "
                f"Start anew: remove the folder (rm -r {root}), or give another --trainer.default_root_dir."
            )


def _check_last(last: Path) -> None:
    """Refuse a folder of states whose ``last.ckpt`` names none of them: to start anew would replace them.

    Raises:
        UserError: naming the newest good one.
    """
    states = list(last.parent.glob("step*.ckpt")) if last.parent.is_dir() else []
    if last.exists() or not (states or last.is_symlink()):
        return
    good = newest_good(last)
    use = f"The newest good one is {good}: go on with --ckpt_path={good}" if good else "There is no good one beside it"
    named = f" names {last.readlink()}, which is gone" if last.is_symlink() else " is gone"
    raise UserError(
        f"Got a run whose {last}{named}, expected it to name a checkpoint. {use}, or remove {last.parent} to start anew."
    )


def check_strategy(strategy: Any) -> None:
    """Refuse strategies under which averages, evaluation or resuming were never held against one process.

    Raises:
        UserError: naming those that were.
    """
    name = getattr(strategy, "class_path", strategy)
    if isinstance(name, str) and name not in STRATEGIES:
        raise UserError(
            f"Got trainer.strategy = {name}, expected DDP (--trainer=configs/trainer/ddp.yaml) or this project's FSDP "
            "(--trainer=configs/trainer/fsdp.yaml): averages, evaluation and resuming are only proved under those."
        )


def _check_keys(args: list[str]) -> None:
    """Refuse a ``config:`` key inside a YAML: it looks like inheritance, and would not be."""
    files = [b for a, b in pairwise(args) if a in ("--config", "-c")]
    files += [a.split("=", 1)[1] for a in args if a.startswith(("--config=", "-c="))]
    for file in files:
        if not Path(file).is_file():
            raise UserError(
                f"Got --config {file}, which is no file, expected a recipe. Shipped ones are in {configs_dir() / 'experiment'}."
            )
        content = yaml.safe_load(Path(file).read_text())
        if not isinstance(content, dict):
            raise UserError(f"Got {file} without settings in it, expected a YAML of option groups such as model and data.")
        if "config" in content:
            raise UserError(
                f"Got a `config:` key in {file}, expected settings only: a recipe does not inherit from another. Give both on "
                "the command line, --config first.yaml --config second.yaml; the second wins."
            )


def load(args: list[str]) -> MeanFlowCLI:
    """Return model, data module and trainer of a recipe without running them, for tests and notebooks.

    Args:
        args: options without a subcommand, for example ``["--config", "configs/experiment/smoke.yaml"]``.

    Returns:
        An object with ``model``, ``datamodule`` and ``trainer``; ``trainer.fit(model, datamodule)`` does what `fit` does.
    """
    return _command_line([f"--config={configs_dir() / 'base.yaml'}", *args], given=args, subcommands=False)


def run(args: list[str] | None = None) -> MeanFlowCLI:
    """Parse, build and run one subcommand; raises what goes wrong (``main`` turns it into a message)."""
    args = sys.argv[1:] if args is None else args
    base = configs_dir() / "base.yaml"
    if args and args[0] in SUBCOMMANDS:  # as the first --config, so that everything given later wins
        return _command_line([args[0], f"--config={base}", *args[1:]], given=args, subcommands=True)
    return _command_line(args, given=args, subcommands=True)


def _command_line(args: list[str], *, given: list[str], subcommands: bool) -> MeanFlowCLI:
    _check_keys(given)
    for pattern in (
        ".*torch.jit.*deprecated.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*does not have many workers.*",
        ".*Consider setting `persistent_workers.*",
        ".*isinstance.*LeafSpec.*",
        ".*your dataloader is not resumable.*",  # it goes on at the optimizer step
        ".*It is recommended to use `self.log.*sync_dist=True.*",  # figures of all processes, equal on each
    ):
        warnings.filterwarnings("ignore", pattern)
    warnings.filterwarnings("ignore", "To copy construct from a tensor", module=".*lr_monitor")
    # "${...}" is resolved once, after all files and options have met; relative, because a subcommand's keys lie below its name
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended to run from within Python.*")
    return MeanFlowCLI(
        MeanFlowModule,
        LatentData,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        parser_class=MeanFlowParser,
        seed_everything_default=0,
        save_config_callback=SaveConfigCallback,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "description": "Train, score and sample one-step generators with MeanFlow.",
            "parser_mode": "omegaconf+",
        },
        args=args,
        run=subcommands,
    )


def main(args: list[str] | None = None) -> None:
    """Run the command line; a mistake of the user's ends in one message and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    watch_parent()
    if (sys.argv[1:] if args is None else args)[:1] == ["fit"]:
        listen_for_good()
    try:
        run(args)
    except Exception as error:
        leave(end(error), error)


__all__ = ["MeanFlowCLI", "configs_dir", "load", "main", "run"]
