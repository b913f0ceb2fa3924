"""A run that writes down what it is doing and is killed in the middle of it: VICTIM="checkpoint:8:0.004:SIGKILL:0".

That is: in the first checkpoint at optimizer step 8 or later, 0.004 seconds after it began, by SIGKILL, process 0.
Each begin and end of a step, checkpoint or validation is one line of faults.log, with the process and the optimizer step.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from lightning import Callback, Trainer

from mf_lightning import cli
from mf_lightning.callbacks import LastCheckpoint
from mf_lightning.launchers import process_rank

LOG = Path(os.environ["FAULTS_LOG"])
RUN = os.environ["FAULTS_RUN"]
KIND, AT, DELAY, SIGNAL, RANK = (os.environ.get("VICTIM") or "none:0:0:SIGKILL:0").split(":")
_done = threading.Event()


def note(what: str, edge: str, step: int) -> None:
    line = f"{RUN} {process_rank()} {what} {edge} {step} {time.monotonic():.4f}\n"
    handle = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, line.encode())
    os.close(handle)
    if edge == "begin" and what == KIND and step >= int(AT) and process_rank() == int(RANK) and not _done.is_set():
        _done.set()
        threading.Thread(target=kill, args=(step,), daemon=True).start()


def kill(step: int) -> None:
    time.sleep(float(DELAY))
    note("kill", SIGNAL, step)
    os.kill(os.getpid(), signal.Signals[SIGNAL])


class Watch(Callback):
    def setup(self, trainer, pl_module, stage):
        note("setup", "begin", trainer.global_step)
        time.sleep(0.3)
        note("setup", "end", trainer.global_step)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        note("step", "begin", trainer.global_step + 1)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        note("step", "end", trainer.global_step)

    def on_validation_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            note("validation", "begin", trainer.global_step)

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            note("validation", "end", trainer.global_step)


@contextmanager
def noted_checkpoint(trainer):
    note("checkpoint", "begin", trainer.global_step)
    yield
    note("checkpoint", "end", trainer.global_step)


def main() -> None:
    save, add, start = Trainer.save_checkpoint, cli.MeanFlowCLI.add_arguments_to_parser, LastCheckpoint.__init__

    def noted(self, *args, **kwargs):
        with noted_checkpoint(self):
            save(self, *args, **kwargs)

    def often(self, folder, every_n_steps=4):
        start(self, folder, every_n_steps)

    def watched(self, parser):
        add(self, parser)
        parser.add_lightning_class_args(Watch, "watch")

    Trainer.save_checkpoint, LastCheckpoint.__init__ = noted, often
    cli.MeanFlowCLI.add_arguments_to_parser = watched
    cli.main(sys.argv[1:])


if __name__ == "__main__":
    main()
