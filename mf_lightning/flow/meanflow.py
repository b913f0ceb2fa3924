"""The MeanFlow loss (arXiv 2505.13447, algorithm 1, equations 9-11, 17-22), paid for only where it acts.

r = t rows (75 % of a batch in the paper) need no JVP: their target is the velocity itself. So one forward with gradient
covers the whole batch, the JVP runs without a graph on the r != t rows only, and on r = t rows the conditional velocity
that guidance needs IS the output that the gradient forward already gave.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mf_lightning import draws
from mf_lightning.draws import Stream
from mf_lightning.flow.guidance import Guidance
from mf_lightning.flow.jvp import total_derivative
from mf_lightning.flow.labels import DropFirstRows, LabelDrop
from mf_lightning.flow.path import check_times, conditional_velocity, interpolate, per_row
from mf_lightning.flow.times import LogitNormal, TimeSampler, fm_count
from mf_lightning.flow.weighting import AdaptiveWeight
from mf_lightning.types import AverageVelocity, LossTerms, UserError


@dataclass
class Draw:
    """All randomness of one batch; times and drops live on the CPU, where rows are sorted without waiting for a GPU."""

    e: Tensor
    """Noise, (B, C, H, W), on the device of the data."""
    t: Tensor
    """Noisier end of the jump, (B,) float32, CPU."""
    r: Tensor
    """Other end, r <= t, (B,) float32, CPU; equal to t on flow-matching rows."""
    dropped: Tensor
    """Whether the row's label is replaced by the null label, (B,) bool, CPU."""


def u_target(v_g: Tensor, dudt: Tensor, *, t: Tensor, r: Tensor) -> Tensor:
    """Return the regression target ``u_tgt = v_g - (t - r) du/dt`` (MeanFlow identity, equation 10).

    Args:
        v_g: velocity that also drove the JVP, guided if guidance is on, (B, C, H, W).
        dudt: total derivative of ``u`` along ``(dz, dr, dt) = (v_g, 0, 1)``, (B, C, H, W).
        t: noisier end of the jump (1 = noise, 0 = data), (B,).
        r: other end, r <= t, (B,).

    Returns:
        (B, C, H, W), detached: no gradient flows through the target.
    """
    return (v_g - per_row(t - r, v_g) * dudt).detach()


class MeanFlowLoss:
    """The MeanFlow loss; with ``fm_fraction: 1`` it is plain flow matching.

    Args:
        times: sampler of (t, r); null is the paper's, LogitNormal(-0.4, 1).
        fm_fraction: share of rows with r = t (0.75 in the paper), an exact count of the global batch, its first rows.
        label_drop: which rows see the null label; null is the official DropFirstRows(0.1). An unconditional network has
            no labels to drop.
        guidance: guidance inside the target; the default is none.
        weight: adaptive weight of a row's summed squared error.
    """

    def __init__(
        self,
        times: TimeSampler | None = None,
        fm_fraction: float = 0.75,
        label_drop: LabelDrop | None = None,
        guidance: Guidance = Guidance(),
        weight: AdaptiveWeight = AdaptiveWeight(),
    ) -> None:
        fm_count(1, fm_fraction)  # refuses a share outside [0, 1] at the door
        self.times = LogitNormal() if times is None else times
        self.fm_fraction = fm_fraction
        self.label_drop = DropFirstRows() if label_drop is None else label_drop
        self.guidance = guidance
        self.weight = weight

    def draw_training(self, x: Tensor, rows: Tensor, *, seed: int, step: int, global_batch_size: int) -> Draw:
        """Return the randomness of training rows: a function of (seed, step, row of the global batch).

        Args:
            x: data, (B, C, H, W); gives shape, dtype and device.
            rows: row of the global batch of each sample, (B,) int64, CPU.
            seed: of the run.
            step: optimizer step.
            global_batch_size: rows per optimizer step over all devices and accumulated batches.
        """
        t, r = self.times(draws.uniform(seed, Stream.TIMES, step=step, rows=rows, count=2))
        r = torch.where(rows < fm_count(global_batch_size, self.fm_fraction), t, r)
        everyone = torch.arange(global_batch_size)
        dropped = self.label_drop(draws.uniform(seed, Stream.LABEL_DROP, step=step, rows=everyone, count=1)[:, 0])
        e = draws.normal(seed, Stream.NOISE, step=step, rows=rows.to(x.device), shape=x.shape[1:], dtype=x.dtype)
        return Draw(e=e, t=t, r=r, dropped=dropped[rows])

    def draw_validation(self, x: Tensor, index: Tensor, *, seed: int) -> Draw:
        """Return fixed randomness of validation samples: a function of (seed, sample), the same at every validation.

        The share of r = t rows is that of training, spread evenly over the samples; no label is dropped.

        Args:
            x: data, (B, C, H, W).
            index: number of each sample in its split, (B,) int64, CPU.
            seed: of the run.
        """
        t, r = self.times(draws.uniform(seed, Stream.VAL_TIMES, step=0, rows=index, count=2))
        before, after = index.double() * self.fm_fraction, (index + 1).double() * self.fm_fraction
        r = torch.where(torch.floor(after + 1e-9) > torch.floor(before + 1e-9), t, r)
        e = draws.normal(seed, Stream.VAL_NOISE, step=0, rows=index.to(x.device), shape=x.shape[1:], dtype=x.dtype)
        return Draw(e=e, t=t, r=r, dropped=torch.zeros_like(index, dtype=torch.bool))

    def __call__(
        self, net: AverageVelocity, x: Tensor, y: Tensor | None, draw: Draw, *, y_null: int | None = None
    ) -> LossTerms:
        """Return the loss of one batch, in the paper's order (algorithm 1).

        Args:
            net: network; its gradient forward runs once, on the whole batch.
            x: data, (B, C, H, W).
            y: labels before dropping, (B,) int64, or None for an unconditional network.
            draw: noise, times and dropped rows.
            y_null: the null label; None for an unconditional network.

        Raises:
            UserError: times outside 0 <= r <= t <= 1; guidance without labels.
        """
        check_times(draw.t, draw.r)
        t, r = (time.to(x.device, x.dtype, non_blocking=True) for time in (draw.t, draw.r))
        jump = (draw.r < draw.t).nonzero()[:, 0]  # rows that need the JVP, found on the CPU

        z_t = interpolate(x, draw.e, t=t)  # (B, C, H, W)
        v_t = conditional_velocity(x, draw.e)  # (B, C, H, W)
        y_in = self._drop_labels(y, draw, y_null)  # (B,)

        u = net(z_t, t=t, r=r, y=y_in)  # (B, C, H, W), the only call with a graph
        v_g = self._guided_velocity(net, z_t, v_t, u, t, y, draw, y_null)  # (B, C, H, W)

        dudt = torch.zeros_like(v_g)
        if len(jump):
            at = jump.to(x.device, non_blocking=True)
            y_at = None if y_in is None else y_in[at]
            dudt[at] = total_derivative(net, z_t[at], v_g[at], t=t[at], r=r[at], y=y_at).to(v_g.dtype)
        u_tgt = u_target(v_g, dudt, t=t, r=r)  # (B, C, H, W)

        u = u.to(x.dtype)  # a network in lower precision is compared in that of the data
        raw_error = _sum_of_squares(u - u_tgt)  # (B,)
        loss = (self.weight(raw_error) * raw_error).mean()
        return LossTerms(
            loss=loss,
            raw_error=raw_error.detach(),
            velocity_error=_sum_of_squares(u.detach() - v_t),
            dudt_norm=_sum_of_squares(dudt).sqrt(),
            u=u.detach(),
            u_tgt=u_tgt,
            v_g=v_g,
        )

    def _drop_labels(self, y: Tensor | None, draw: Draw, y_null: int | None) -> Tensor | None:
        if y is None or y_null is None:
            return None
        dropped = draw.dropped.to(y.device, non_blocking=True)
        return torch.where(dropped, torch.full_like(y, y_null), y)

    @torch.no_grad()
    def _guided_velocity(
        self,
        net: AverageVelocity,
        z_t: Tensor,
        v_t: Tensor,
        u: Tensor,
        t: Tensor,
        y: Tensor | None,
        draw: Draw,
        y_null: int | None,
    ) -> Tensor:
        """Return ``v_g`` (equations 17-21): guided where the label is kept and t lies in the interval, else ``v_t``.

        All velocities that it needs come from ONE call without gradient: ``v_u`` on the guided rows, ``v_c`` on the
        guided rows with r != t. On r = t rows ``v_c`` is ``u`` itself, unless dropout makes the two passes differ.
        """
        if self.guidance.is_none:
            return v_t
        if y is None or y_null is None:
            raise UserError(
                f"Got guidance {self.guidance} for an unconditional network, expected none. Set omega = 1 and kappa = 0, "
                "or train with labels."
            )
        guided = ~draw.dropped & self.guidance.acts_at(draw.t)
        apart = guided if _has_active_dropout(net) else guided & (draw.r < draw.t)
        rows_u = guided.nonzero()[:, 0] if self.guidance.null_weight != 0 else guided.new_zeros(0, dtype=torch.int64)
        rows_c = apart.nonzero()[:, 0] if self.guidance.kappa != 0 else rows_u[:0]
        if not bool(guided.any()):
            return v_t

        device = z_t.device
        rows = torch.cat([rows_u, rows_c]).to(device, non_blocking=True)
        v_u = v_c = None
        if len(rows):
            labels = torch.cat([torch.full_like(y[: len(rows_u)], y_null), y[rows[len(rows_u) :]]])
            with _without_dropout(net):
                velocity = net(z_t[rows], t=t[rows], r=t[rows], y=labels).to(v_t.dtype)
            v_u = velocity[: len(rows_u)]
        at = guided.nonzero()[:, 0].to(device, non_blocking=True)
        if self.guidance.kappa != 0:
            v_c = u.detach().to(v_t.dtype, copy=True)
            if len(rows_c):
                v_c[rows[len(rows_u) :]] = velocity[len(rows_u) :]
            v_c = v_c[at]
        return v_t.index_copy(0, at, self.guidance.velocity(v_t[at], v_c=v_c, v_u=v_u))


def _sum_of_squares(value: Tensor) -> Tensor:
    """Return the squared norm of each row, summed over pixels: (B, C, H, W) => (B,)."""
    return value.square().flatten(1).sum(dim=1)


def _dropouts(net: AverageVelocity) -> list[nn.Module]:
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    if not isinstance(net, nn.Module):
        return []
    return [module for module in net.modules() if isinstance(module, kinds) and module.training and module.p > 0]


def _has_active_dropout(net: AverageVelocity) -> bool:
    return bool(_dropouts(net))


@contextmanager
def _without_dropout(net: AverageVelocity):
    """Switch active dropout off: the official code takes guidance velocities without it."""
    active = _dropouts(net)
    for module in active:
        module.eval()
    try:
        yield
    finally:
        for module in active:
            module.train()
