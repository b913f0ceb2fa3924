"""The MeanFlow loss (arXiv 2505.13447, algorithm 1, equations 9-11, 17-22), paid for only where it acts.

r = t rows (75 % of a batch in the paper) need no JVP: their target is the velocity itself. So one forward with gradient
covers the whole batch, tangents ride beside it on the r < t rows only (or a JVP runs apart on them), without a graph, and on
r = t rows the conditional velocity that guidance needs IS the output that the gradient forward already gave.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mf_lightning import draws
from mf_lightning.draws import Stream
from mf_lightning.flow.guidance import Guidance, GuidanceSchedule
from mf_lightning.flow.jvp import JVPMethod, JVPPrecision, choose_jvp, jvp_precision
from mf_lightning.flow.labels import DropFirstRows, LabelDrop
from mf_lightning.flow.passes import PLAIN, Passes
from mf_lightning.flow.path import check_times, conditional_velocity, interpolate, per_row
from mf_lightning.flow.rows import Draw, count_jumps, velocity_rows
from mf_lightning.flow.times import LogitNormal, TimeSampler, fm_count
from mf_lightning.flow.weighting import AdaptiveWeight
from mf_lightning.transfer import to_device
from mf_lightning.types import AverageVelocity, LossTerms, UserError


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
        jvp: "network" takes du/dt from the network's own tangents, "torch" from torch.func.jvp in a pass of its own; null
            is "network" where the network has them (SiT does), else "torch". Without r < t rows there is nothing to derive.
        jvp_precision: null is that of the gradient forward, whose primals the network's tangents then share; "32-true" or
            "bf16-mixed" differentiate in a pass of their own.
        guidance_schedule: guidance by optimizer step, in the place of ``guidance``; null is the same at all steps.
    """

    def __init__(
        self,
        times: TimeSampler | None = None,
        fm_fraction: float = 0.75,
        label_drop: LabelDrop | None = None,
        guidance: Guidance = Guidance(),
        weight: AdaptiveWeight = AdaptiveWeight(),
        jvp: JVPMethod | None = None,
        jvp_precision: JVPPrecision | None = None,
        guidance_schedule: GuidanceSchedule | None = None,
    ) -> None:
        fm_count(1, fm_fraction)  # refuses a share outside [0, 1] at the door
        if guidance_schedule is not None and guidance != Guidance():
            raise UserError(
                f"Got {guidance} beside a guidance_schedule, expected one of them. Leave guidance out, or set it to "
                "{omega: 1.0, kappa: 0.0}."
            )
        self.times = LogitNormal() if times is None else times
        self.fm_fraction = fm_fraction
        self.label_drop = DropFirstRows() if label_drop is None else label_drop
        self.guidance = guidance
        self.guidance_schedule = guidance_schedule
        self.weight = weight
        self.jvp: JVPMethod | None = jvp
        self.jvp_precision: JVPPrecision | None = jvp_precision

    def guidance_at(self, step: int) -> Guidance:
        """Return the guidance of an optimizer step."""
        return self.guidance if self.guidance_schedule is None else self.guidance_schedule.at(step)

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
        e = draws.normal(seed, Stream.NOISE, step=step, rows=to_device(rows, x.device), shape=x.shape[1:], dtype=x.dtype)
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
        e = draws.normal(seed, Stream.VAL_NOISE, step=0, rows=to_device(index, x.device), shape=x.shape[1:], dtype=x.dtype)
        return Draw(e=e, t=t, r=r, dropped=torch.zeros_like(index, dtype=torch.bool))

    def __call__(
        self,
        net: AverageVelocity,
        x: Tensor,
        y: Tensor | None,
        draw: Draw,
        *,
        y_null: int | None = None,
        passes: Passes = PLAIN,
        step: int = 0,
    ) -> LossTerms:
        """Return the loss of one batch.

        Args:
            net: network; its gradient forward runs once, on the whole batch.
            x: data, (B, C, H, W).
            y: labels before dropping, (B,) int64, or None for an unconditional network.
            draw: noise, times and dropped rows.
            y_null: the null label; None for an unconditional network.
            passes: how the network is called; the default is plain torch.
            step: optimizer step, by which a guidance schedule chooses its stage.

        Raises:
            UserError: times outside 0 <= r <= t <= 1; guidance without labels; a JVP that the network cannot give.
        """
        check_times(draw.t, draw.r)
        asked = self.guidance_schedule or self.guidance  # at the first step, also where guidance begins later
        if not asked.is_none and (y is None or y_null is None):
            raise UserError(
                f"Got guidance {asked} for an unconditional network, expected none. Set omega = 1 and kappa = 0, "
                "or train with labels."
            )
        y = None if y_null is None else y
        order = draw.order()  # r < t rows last, so that they are one slice
        how = (y_null, passes, self.guidance_at(step))
        if order is None:
            return self._sorted_loss(net, x, y, draw, *how)
        at = to_device(order, x.device)
        terms = self._sorted_loss(net, x[at], None if y is None else y[at], draw.sorted_by(order), *how)
        back = to_device(torch.argsort(order), x.device)
        return terms.with_rows(back)

    def _sorted_loss(
        self,
        net: AverageVelocity,
        x: Tensor,
        y: Tensor | None,
        draw: Draw,
        y_null: int | None,
        passes: Passes,
        guidance: Guidance,
    ) -> LossTerms:
        """Return the loss in the paper's order (algorithm 1); rows with r < t come last."""
        time_dtype = torch.promote_types(x.dtype, torch.float32)  # bfloat16 times a hundredth apart would be the same
        t, r = (to_device(time, x.device).to(time_dtype) for time in (draw.t, draw.r))
        z_t = interpolate(x, draw.e, t=t)  # (B, C, H, W)
        v_t = conditional_velocity(x, draw.e)  # (B, C, H, W)
        guided = _guide(guidance, net, z_t, t, y, draw, y_null, passes)  # velocities without gradient, or None

        jumps = slice(len(x) - count_jumps(draw, passes), None)  # the rows that need du/dt
        v_jump = v_t[jumps] if guided is None else guided.velocity(v_t, rows=jumps)  # (J, C, H, W)
        y_in = None if y is None else torch.where(to_device(draw.dropped, x.device), y_null, y)  # (B,)
        u, dudt_jump = self._u_and_derivative(net, z_t, v_jump, t, r, y_in, jumps, passes)

        v_g = v_t if guided is None else guided.velocity(v_t, u=u.detach())  # (B, C, H, W)
        dudt = torch.zeros_like(v_g)
        if dudt_jump is not None:
            jumping = to_device(draw.jumps[jumps], x.device)
            dudt[jumps] = torch.where(_per_row(jumping, v_g), dudt_jump.to(v_g.dtype), 0)
        u_tgt = u_target(v_g, dudt, t=t, r=r)  # (B, C, H, W)

        u = u.to(x.dtype)  # a network in lower precision is compared in that of the data
        raw_error = _sum_of_squares(u - u_tgt)  # (B,)
        return LossTerms(
            loss=(self.weight(raw_error) * raw_error).mean(),
            raw_error=raw_error.detach(),
            velocity_error=_sum_of_squares(u.detach() - v_t),
            dudt=dudt,
            dudt_norm=_sum_of_squares(dudt).sqrt(),
            u=u.detach(),
            u_tgt=u_tgt,
            v_g=v_g,
        )

    def _u_and_derivative(
        self,
        net: AverageVelocity,
        z_t: Tensor,
        v_jump: Tensor,
        t: Tensor,
        r: Tensor,
        y: Tensor | None,
        jumps: slice,
        passes: Passes,
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``u`` of the batch, the only call with a graph, and ``du/dt`` of the rows that need it."""
        if not len(v_jump):
            return passes.u(net, z_t, t=t, r=r, y=y), None
        method = choose_jvp(self.jvp, net)
        if method == "network" and self.jvp_precision is None:
            return passes.u_and_dudt(net, z_t, v_jump, t=t, r=r, y=y)
        u = passes.u(net, z_t, t=t, r=r, y=y)
        z, own = z_t[jumps], {"t": t[jumps], "r": r[jumps], "y": None if y is None else y[jumps]}
        with torch.no_grad(), jvp_precision(self.jvp_precision, z_t):
            if method == "network":
                return u, passes.u_and_dudt(net, z, v_jump, **own)[1]
            return u, passes.dudt(net, z, v_jump, **own)


@dataclass(frozen=True)
class GuidedRows:
    """The velocities of guidance, each where it was computed, 0 elsewhere."""

    guidance: Guidance
    guided: Tensor
    """(B,) bool: rows that guidance acts on."""
    apart: Tensor
    """(B,) bool: rows with a ``v_c`` of their own; elsewhere it is the gradient forward's ``u``."""
    v_u: Tensor
    v_c: Tensor

    def velocity(self, v_t: Tensor, *, u: Tensor | None = None, rows: slice = slice(None)) -> Tensor:
        """Return ``v_g`` of some rows (equations 17-21): guided where guidance acts, else ``v_t``."""
        v_t, v_u, v_c = v_t[rows], self.v_u[rows], self.v_c[rows]
        if u is not None:
            v_c = torch.where(_per_row(self.apart[rows], v_c), v_c, u.to(v_c.dtype))
        v_g = self.guidance.velocity(v_t, v_c=v_c, v_u=v_u)
        return torch.where(_per_row(self.guided[rows], v_g), v_g, v_t)


@torch.no_grad()
def _guide(
    guidance: Guidance,
    net: AverageVelocity,
    z_t: Tensor,
    t: Tensor,
    y: Tensor | None,
    draw: Draw,
    y_null: int | None,
    passes: Passes,
) -> GuidedRows | None:
    """Return the velocities that guidance needs (equations 17-21), from ONE call without gradient; None without guidance.

    ``v_u`` is computed on the rows inside the interval whose label is kept, ``v_c`` on those of them with r < t. On
    r = t rows ``v_c`` is ``u`` itself, unless dropout makes the two passes differ.
    """
    guided = ~draw.dropped & guidance.acts_at(draw.t)
    if guidance.is_none or not (bool(guided.any()) or passes.least_rows):
        return None
    apart = guided if _dropouts(net) else guided & draw.jumps
    plan = velocity_rows(guided, apart, guidance, passes)
    device, v_u, v_c = z_t.device, torch.zeros_like(z_t), torch.zeros_like(z_t)
    if len(plan.rows):
        at = to_device(plan.rows, device)
        labels = y[at]
        labels[: plan.unconditional] = y_null
        with without_dropout(net):
            velocity = passes.u(net, z_t[at], t=t[at], r=t[at], y=labels).to(z_t.dtype)
        # casts of the weights made here have no graph; the gradient forward must not find them in autocast's cache
        torch.clear_autocast_cache()
        end = plan.unconditional + plan.conditional
        v_u.index_copy_(0, at[: plan.unconditional], velocity[: plan.unconditional])
        v_c.index_copy_(0, at[plan.unconditional : end], velocity[plan.unconditional : end])
    return GuidedRows(guidance, to_device(guided, device), to_device(apart, device), v_u=v_u, v_c=v_c)


def _sum_of_squares(value: Tensor) -> Tensor:
    """Return the squared norm of each row, summed over pixels: (B, C, H, W), or (B,) and any other shape, => (B,)."""
    return value.square().reshape(len(value), math.prod(value.shape[1:])).sum(dim=1)


def _dropouts(net: AverageVelocity) -> list[nn.Module]:
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    if not isinstance(net, nn.Module):
        return []
    return [module for module in net.modules() if isinstance(module, kinds) and module.training and module.p > 0]


def _per_row(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask, (B,) bool, shaped to choose rows of ``like``."""
    return mask.reshape(-1, *[1] * (like.dim() - 1))


@contextmanager
def without_dropout(net: AverageVelocity):
    """Switch active dropout off: the official code takes guidance velocities without it."""
    active = _dropouts(net)
    for module in active:
        module.eval()
    try:
        yield
    finally:
        for module in active:
            module.train()
