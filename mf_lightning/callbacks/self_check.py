"""A check before the first step that the derivative is the derivative: wrong tangents raise nothing and train silently."""

from __future__ import annotations

import copy

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from mf_lightning import draws
from mf_lightning.draws import Stream
from mf_lightning.flow.meanflow import without_dropout
from mf_lightning.flow.passes import PLAIN, Passes
from mf_lightning.flow.path import interpolate
from mf_lightning.flow.rows import Draw
from mf_lightning.sharding import is_sharded, materialise
from mf_lightning.types import LatentBatch, LossTerms, UserError

STEP = 1e-4
"""Of the central differences in float64: their own error is about its square."""
EXACT, TF32, BFLOAT16 = 1e-3, 2e-2, 0.15
"""Largest relative errors, of norms, in float32 or float64, in TF32, in bfloat16."""


class SelfCheck(Callback):
    """Hold du/dt of the first batch against central differences, and the passes that will train against plain ones.

    It runs once before the first step of each fit, on a copy of the network whose zero-initialised weights are replaced by
    small random ones (a fresh network has u = 0 and du/dt = 0, and would be compared with itself), without dropout.

    Args:
        enabled: whether to check; false trusts the tangents and says so in the log.
        rows: rows with r < t that are compared with central differences, two float64 passes each.
    """

    def __init__(self, enabled: bool = True, rows: int = 4) -> None:
        if rows < 1:
            raise UserError(f"Got self_check.rows = {rows}, expected at least 1. To turn it off: self_check.enabled=false.")
        self.enabled = enabled
        self.rows = rows
        self.errors: dict[str, float] = {}
        """What was measured, by name: relative errors."""
        self._done = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Each fit is checked anew."""
        self._done = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: LatentBatch, batch_idx: int) -> None:
        """Check on the first batch.

        Raises:
            UserError: a derivative or a compiled pass is wrong; the run stops before its first step.
        """
        if self._done:
            return
        self._done = True
        if not self.enabled:
            rank_zero_info("Self-check is off (self_check.enabled = false): the JVP and the compiled passes are trusted.")
            return
        net = fill_zeros(_copy(pl_module))
        with without_dropout(net):
            self.errors = self._compare(trainer, pl_module, net, batch)
        measured = ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        rank_zero_info(f"Self-check passed (relative errors): {measured or 'nothing to compare, no row has r < t'}")

    def _compare(self, trainer: Trainer, pl_module: LightningModule, net: nn.Module, batch: LatentBatch) -> dict[str, float]:
        loss, y = pl_module.loss, None if net.y_null is None else batch.y
        step, rows = trainer.global_step, trainer.datamodule.batch_size
        draw = loss.draw_training(batch.x, batch.row, seed=pl_module.seed, step=step, global_batch_size=rows)
        self.errors, bound = {}, self._bound(trainer, pl_module)
        jumps = draw.jumps.nonzero()[:, 0][: self.rows]
        if len(jumps):
            at = jumps.to(batch.x.device)
            few = (batch.x[at], None if y is None else y[at], draw.sorted_by(jumps))
            self._check_derivative(trainer, pl_module, net, *few, bound)
        if pl_module.compiled and not is_sharded(pl_module.net):
            try:
                self._check_compiled(trainer, pl_module, net, batch.x, y, draw, bound)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    "Got too little memory for the self-check, which runs the first batch without compilation as well, "
                    "expected room for it. Lower data.batch_size, set model.net.init_args.activation_checkpointing, or give "
                    "self_check.enabled=false."
                ) from error
        return self.errors

    @torch.no_grad()
    def _check_derivative(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        net: nn.Module,
        x: Tensor,
        y: Tensor | None,
        draw: Draw,
        bound: float,
    ) -> None:
        """Compare du/dt of a few rows in float32 with central differences, and in training's precision with float32."""
        same_precision = copy.copy(pl_module.loss)
        same_precision.jvp_precision = None
        with torch.autocast(x.device.type, enabled=False):
            plain = same_precision(net, x, y, draw, y_null=net.y_null)
        labels = None if y is None else torch.where(draw.dropped.to(y.device), net.y_null, y)
        exact = central_differences(net, x, labels, draw, plain.v_g)
        rounded = pl_module.tf32 or getattr(net, "jvp_attention", None) == "flash"  # a kernel of TF32 products
        self._judge("du/dt", "against central differences", _distance(plain.dudt, exact), TF32 if rounded else EXACT)
        if bound > EXACT:
            with trainer.precision_plugin.forward_context():
                mixed = pl_module.loss(net, x, y, draw, y_null=net.y_null)
            self._judge("du/dt as it will run", "against float32", _distance(mixed.dudt, plain.dudt), bound)

    def _check_compiled(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        net: nn.Module,
        x: Tensor,
        y: Tensor | None,
        draw: Draw,
        bound: float,
    ) -> None:
        """Compare the compiled passes with plain ones on the whole batch: its graphs then serve the training."""

        def run(passes: Passes) -> tuple[LossTerms, Tensor]:
            net.zero_grad()
            with trainer.precision_plugin.forward_context():
                terms = pl_module.loss(net, x, y, draw, y_null=net.y_null, passes=passes)
            terms.loss.backward()
            return terms, torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

        (plain, gradient), (compiled, compiled_gradient) = run(PLAIN), run(pl_module.passes)
        self._judge("compiled u", "against plain", _distance(compiled.u, plain.u), bound)
        self._judge("compiled du/dt", "against plain", _distance(compiled.dudt, plain.dudt), bound)
        self._judge("compiled gradient", "against plain", _distance(compiled_gradient, gradient), bound)

    def _bound(self, trainer: Trainer, pl_module: LightningModule) -> float:
        if "bf16" in str(trainer.precision) or pl_module.loss.jvp_precision == "bf16-mixed":
            return BFLOAT16
        return TF32 if pl_module.tf32 else EXACT

    def _judge(self, name: str, against: str, error: float, bound: float) -> None:
        self.errors[name] = error
        if not error <= bound:
            raise UserError(
                f"Got a self-check that fails: {name} {against} has a relative error of {error:.2g}, expected at most "
                f"{bound:g}. Wrong tangents train silently, so the run stops. Find what is wrong with "
                "model.loss.init_args.jvp=torch, model.net.init_args.jvp_attention=math, model.compile=false, or "
                "trainer.precision=32-true; self_check.enabled=false runs all the same."
            )


def _copy(pl_module: LightningModule) -> nn.Module:
    """Return a copy of the network; of a sharded one, which is never whole, one with its first block only, whole and fresh."""
    net = pl_module.net
    if not is_sharded(net):
        return copy.deepcopy(net)
    with torch.device("meta"):
        short = pl_module.make_net(pl_module.trainer.datamodule.latent_spec)
    short.blocks = short.blocks[:1]
    short = short.to(next(net.parameters()).dtype)
    materialise(short, pl_module.device, pl_module.device)
    return short


def fill_zeros(net: nn.Module) -> nn.Module:
    """Replace parameters that are all zero by small random numbers, in place."""
    with torch.no_grad():
        for number, parameter in enumerate(net.parameters()):
            if not bool(parameter.any()):
                rows = torch.tensor([number], device=parameter.device)
                noise = draws.normal(0, Stream.SELF_CHECK, step=0, rows=rows, shape=parameter.shape, dtype=parameter.dtype)
                parameter.copy_(0.05 * noise[0])
    return net


@torch.no_grad()
def central_differences(net: nn.Module, x: Tensor, y: Tensor | None, draw: Draw, v_g: Tensor) -> Tensor:
    """Return ``[u(z + h v, t + h) - u(z - h v, t - h)] / 2h``, (B, C, H, W), by a float64 copy of the network."""
    exact = copy.deepcopy(net).double()
    x, e, v_g = x.double(), draw.e.double(), v_g.double()
    t, r = (time.to(x.device).double() for time in (draw.t, draw.r))
    z_t = interpolate(x, e, t=t)
    with torch.autocast(x.device.type, enabled=False):
        ahead, behind = (exact(z_t + h * v_g.to(x), t=t + h, r=r, y=y) for h in (STEP, -STEP))
    return (ahead - behind) / (2 * STEP)


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference over the norm of the second."""
    one, other = one.double(), other.double()
    scale = other.norm()
    return float((one - other).norm() / scale) if scale > 0 else float((one - other).norm())
