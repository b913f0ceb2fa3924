"""A recorded run, for comparisons across processes: python tests/parallel_run.py OUT.pt [options of fit].

It starts from random non-zero weights (a fresh network has u = 0 and du/dt = 0 and proves nothing). WITHOUT_AVERAGING=1 leaves
each process of DDP with the gradient of its own rows, which the comparison must notice.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning import Callback

from mf_lightning import draws
from mf_lightning.cli import load
from mf_lightning.draws import Stream
from mf_lightning.sharding import gathered, local, placed


class Recorder(Callback):
    """Keep raw errors and |du/dt| by global row, gradients, and how far processes' gradients are apart."""

    def __init__(self) -> None:
        self.steps: list[dict] = []
        self.rows: list[tuple] = []

    @torch.no_grad()
    def on_fit_start(self, trainer, pl_module):
        std = float(os.environ.get("INITIAL_STD", "0.2"))
        for number, (name, parameter) in enumerate(pl_module.net.named_parameters()):
            one = torch.tensor([number])
            noise = draws.normal(7, Stream.SELF_CHECK, step=1, rows=one, shape=parameter.shape, dtype=parameter.dtype)
            local(parameter).copy_(local(placed(std * noise[0], parameter)))
            for weights in next(c for c in trainer.callbacks if type(c).__name__ == "EMA").weights.values():
                local(weights[name]).copy_(local(parameter))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if os.environ.get("WITHOUT_AVERAGING"):
            trainer.strategy.model.require_backward_grad_sync = False

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        terms = pl_module.last_terms
        self.rows.append((batch.row.clone(), batch.index.clone(), terms.raw_error.clone(), terms.dudt_norm.clone()))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = {name: gathered(p.grad, keep=True).clone() for name, p in pl_module.net.named_parameters()}
        apart = 0.0
        if dist.is_initialized():
            flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
            everyone = [torch.empty_like(flat) for _ in range(trainer.world_size)]
            dist.all_gather(everyone, flat)
            apart = max(float((other - flat).abs().max() / flat.abs().max()) for other in everyone)
        self.steps.append({"gradients": gradients, "apart": apart})


def by_row(rows: list[tuple], accumulate: int) -> dict[str, torch.Tensor]:
    """Return what was seen of each row of each step by all processes, in the order of the global batch."""
    parts = [torch.cat([batch[i].cpu() for batch in rows]) for i in range(4)]
    step = torch.cat([torch.full_like(batch[0], number // accumulate) for number, batch in enumerate(rows)])
    mine = (step, *parts)
    everyone = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    step, row, index, raw_error, dudt_norm = (torch.cat([one[i] for one in everyone]) for i in range(5))
    order = torch.argsort(step * 100_000 + row)
    return {"row": row[order], "index": index[order], "raw_error": raw_error[order], "dudt_norm": dudt_norm[order]}


def main(out: Path, options: list[str]) -> None:
    cli = load(options)
    recorder = Recorder()
    cli.trainer.callbacks.insert(0, recorder)
    ema_first = [c for c in cli.trainer.callbacks if type(c).__name__ == "EMA"]
    cli.trainer.callbacks.sort(key=lambda c: c not in ema_first)  # averages exist when weights are replaced
    cli.trainer.fit(cli.model, cli.datamodule)
    seen = by_row(recorder.rows, cli.trainer.accumulate_grad_batches)
    result = {
        **seen,
        "steps": recorder.steps,
        "weights": gathered(cli.model.net.state_dict(), keep=True),
        "ema": gathered(ema_first[0].weights, keep=True),
        "rows": next(c for c in cli.trainer.callbacks if type(c).__name__ == "SampleEval").rows,
    }
    if cli.trainer.is_global_zero:
        torch.save(result, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
