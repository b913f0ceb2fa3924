"""A run that is asked to go: it finishes its step, writes a checkpoint and says by its exit code that it wants to come back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer

from mf_lightning.types import UserError

TEMPORARY_FAILURE = 75
"""EX_TEMPFAIL of sysexits.h: "try again later"."""


class Preempted(Exception):
    """The run was asked to end; all processes raise it at the same point, between two steps or inside a validation."""

    def __init__(self, signum: int, step: int, exit_code: int) -> None:
        super().__init__(f"{signal.Signals(signum).name} at step {step}")
        self.signal = signal.Signals(signum).name
        self.step = step
        self.exit_code = exit_code


class _Listener:
    """What this process was asked by signals; one for the process, since signals are."""

    def __init__(self) -> None:
        self.received = 0
        self._earlier: dict[int, Any] = {}
        self._for_good = False

    def listen(self, numbers: Iterable[int], *, for_good: bool = False) -> None:
        """Note these signals from now on, and leave others as they were."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._for_good = self._for_good or for_good
        if not self._for_good:
            self.received = 0
        wanted = set(numbers)
        self._restore(set(self._earlier) - wanted)
        for number in wanted - set(self._earlier):
            self._earlier[number] = signal.signal(number, self._notice)

    def stop(self) -> None:
        """Give the signals back, unless the process listens for good."""
        if not self._for_good and threading.current_thread() is threading.main_thread():
            self._restore(set(self._earlier))

    def _restore(self, numbers: set[int]) -> None:
        for number in numbers:
            signal.signal(number, self._earlier.pop(number))

    def _notice(self, signum: int, frame: FrameType | None) -> None:
        self.received = self.received or signum


_listener = _Listener()


def listen_for_good() -> None:
    """Note SIGTERM and SIGUSR1 until the process ends: also while it starts, and while it writes its last checkpoint."""
    _listener.listen([signal.SIGTERM, signal.SIGUSR1], for_good=True)


class Preemption(Callback):
    """End a fit in order at a signal: after the step, with a checkpoint, with an exit code on which schedulers requeue.

    A signal that reaches one process ends all of them at the same step. Inside a validation the run does not wait for its end:
    a resumed run does that validation again, whole. What comes before the first step is noted, and answered there.

    Args:
        signals: that mean "go"; an empty list leaves all signals alone.
        exit_code: of the processes that were asked to go; 75 is the Unix convention for "try again later".
    """

    def __init__(self, signals: list[str] | None = None, exit_code: int = TEMPORARY_FAILURE) -> None:
        signals = ["SIGTERM", "SIGUSR1"] if signals is None else signals
        unknown = [name for name in signals if not hasattr(signal, name) or not name.startswith("SIG")]
        if unknown or not 0 < exit_code < 126:
            raise UserError(
                f"Got preemption.signals = {signals}, exit_code = {exit_code}, expected names such as SIGTERM and SIGUSR1, "
                "and a code between 1 and 125."
            )
        self.signals = [signal.Signals[name] for name in signals]
        self.exit_code = exit_code
        self._group: dist.ProcessGroup | None = None
        self._agreeing: tuple[dist.Work, torch.Tensor] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen, and keep Lightning from it: its handlers talk to other processes, and requeue SLURM jobs by themselves."""
        if stage != "fit":
            return
        _listener.listen(self.signals)
        if self.signals:
            trainer._signal_connector.register_signal_handlers = lambda: None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        _listener.stop()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a way to agree that does not go through the devices."""
        self._agreeing = None
        if trainer.world_size > 1 and self.signals and self._group is None:
            self._group = dist.new_group(backend="gloo")
        # Lightning's own way makes every step wait for the device
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Go, between two optimizer steps."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.poll(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Go, inside a validation of a fit."""
        self.poll(trainer)

    def poll(self, trainer: Trainer) -> None:
        """Go if any process was asked to; all processes call it equally often.

        What the others say arrives one call later, so that no step waits for it.

        Raises:
            Preempted: in all processes at the same call.
        """
        if trainer.state.fn != "fit" or not self.signals:
            return
        asked = _listener.received if self._group is None else self._agreed()
        if asked:
            raise Preempted(asked, trainer.global_step, self.exit_code)

    def _agreed(self) -> int:
        asked = 0
        if self._agreeing is not None:
            work, flag = self._agreeing
            work.wait()
            asked = int(flag)
        flag = torch.tensor(_listener.received)
        self._agreeing = (dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True), flag)
        return asked

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back, unless a checkpoint is yet to be written: a second signal must not cut that off."""
        if not isinstance(exception, Preempted):
            _listener.stop()


def poll(trainer: Trainer) -> None:
    """Let a fit go inside long work of a callback, where it was asked to; all processes call it equally often."""
    for callback in trainer.callbacks:
        if isinstance(callback, Preemption):
            callback.poll(trainer)
