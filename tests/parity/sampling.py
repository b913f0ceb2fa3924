"""The files of time draws and of samplers."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from mf_lightning.flow import Draw, LogitNormal, MeanFlowLoss, TwoLogitNormals, Uniform, jump, sample, time_grid
from mf_lightning.flow.times import TimeSampler, fm_count
from mf_lightning.types import AverageVelocity
from tests.parity.family import Family
from tests.parity.report import DEVIATES, FAIL, Checks, MissingArray, Oracle

EXACT = 1e-12
"""A quotient of two counts, but for its rounding."""
DRAWS, POOLED = 20_000, 10
"""Draws where a file does not say how many; our side pools ten times the file's number, so that what is left of the
distance is the file's own noise. The bound stays that of two samples of the file's size."""


def draw_times(times: TimeSampler, fm_fraction: float, n: int) -> Draw:
    """Return our training draws of ten steps with n rows each."""
    loss, x, rows = MeanFlowLoss(times=times, fm_fraction=fm_fraction), torch.zeros(n, 1, 1, 1), torch.arange(n)
    steps = [loss.draw_training(x, rows, seed=0, step=step, global_batch_size=n) for step in range(POOLED)]
    return Draw(*(torch.cat([getattr(step, name) for step in steps]) for name in ("e", "t", "r", "dropped")))


def ks_distance(draws: Tensor, quantiles: Tensor, levels: Tensor) -> float:
    """Return the largest difference of two distribution functions, at the stored quantiles; NaN if they are none."""
    rising = all(bool((each.diff() >= 0).all()) for each in (quantiles, levels))  # NaN does not rise
    if not (rising and quantiles.shape == levels.shape and quantiles.isfinite().all() and draws.isfinite().all()):
        return math.nan
    below = torch.searchsorted(draws.double().sort().values, quantiles.double(), right=True)
    return (below / len(draws) - levels).abs().max().item()


def _same_distribution(checks: Checks, key: str, draws: Tensor, n: float, *, deviates: str = "") -> None:
    """Compare draws with a quantile function of n draws (Kolmogorov-Smirnov); ``deviates`` says why not to judge."""
    bound = 1.6 * math.sqrt(2 / n)
    try:
        distance = ks_distance(draws, checks.oracle[key], checks.oracle["quantile_levels"])
    except MissingArray as error:
        return checks.judge(key, math.nan, bound, str(error))
    if math.isnan(distance):
        return checks.judge(key, distance, bound, "the stored quantiles, or our draws, are not finite numbers")
    if deviates:
        return checks.add(key, DEVIATES, distance, bound, deviates)
    return checks.judge(key, distance, bound, "Kolmogorov-Smirnov distance")


def check_times(oracle: Oracle) -> Checks:
    """Compare our times with the official sample_tr."""
    checks = Checks(oracle)
    for name in _names(oracle):
        kind = name.split("_")[0]
        mean, std, share = oracle[f"{name}/settings"].tolist()
        if kind not in ("lognormal", "uniform"):
            checks.add(name, FAIL, None, None, f"got the distribution '{kind}', expected lognormal or uniform")
            continue
        n = oracle.number(f"{name}/n")
        draw = draw_times(Uniform() if kind == "uniform" else LogitNormal(mean, std), share, n)
        equal = draw.r == draw.t
        parts = {
            "t": (draw.t, n),
            "r_given_r_ne_t": (draw.r[~equal], n * (1 - share)),
            "t_given_r_ne_t": (draw.t[~equal], n * (1 - share)),
            "h_given_r_ne_t": ((draw.t - draw.r)[~equal], n * (1 - share)),
            "t_given_r_eq_t": (draw.t[equal], n * share),
        }
        for key, (values, size) in parts.items():
            if size > 0:
                _same_distribution(checks, f"{name}/{key}", values, size)
        fraction = f"{name}/fraction_r_eq_t"
        checks.close(fraction, fm_count(n, share) / n, bound=EXACT)
        checks.close(fraction, equal.double().mean(), name=f"{fraction} (drawn)", bound=EXACT)
        pairs = oracle[f"{name}/n_eq_by_batch"]
        ours = torch.tensor([[batch, fm_count(batch, share)] for batch, _ in pairs.tolist()])
        checks.same(f"{name}/n_eq_by_batch", ours)
    return checks


def check_py_meanflow_times(oracle: Oracle) -> Checks:
    """Compare our times with py-meanflow's, where chance decides which rows have r = t; only its v0 is the paper's."""
    checks = Checks(oracle)
    for name in _names(oracle):
        *spread, ratio = oracle[f"{name}/settings"].tolist()
        if name not in ("v0_script", "v1_default"):
            checks.add(name, FAIL, None, None, "got an unknown sampler, expected v0_script or v1_default")
            continue
        n = int(oracle.number(f"{name}/n")) if f"{name}/n" in oracle else DRAWS
        draw = draw_times(TwoLogitNormals(*spread), 1 - ratio, n)
        apart = draw.r != draw.t
        why = "" if name == "v0_script" else "v1 equalises before it sorts: r = t more often, t is not the larger draw"
        _same_distribution(checks, f"{name}/t", draw.t, n, deviates=why)
        _same_distribution(checks, f"{name}/r_given_r_ne_t", draw.r[apart], n * ratio, deviates=why)
        key, bound = f"{name}/fraction_r_eq_t", 1.6 * math.sqrt(2 / n)
        error = abs((~apart).double().mean().item() - oracle.number(key))
        if why and not math.isnan(error):
            checks.add(key, DEVIATES, error, bound, why)
        else:
            checks.judge(key, error, bound, "theirs by chance, ours an exact count")
    return checks


def _names(oracle: Oracle) -> list[str]:
    """Return the samplers of a file; without any there is nothing to compare."""
    names = sorted({key.split("/")[0] for key in oracle.arrays if "/" in key})
    if not names:
        raise MissingArray(f"missing arrays 'NAME/settings' in {oracle.name}; compute the file again")
    return names


class Guided:
    """A network with guidance at sampling time, as zhuyu-cs has it: ``u_null + scale (u_label - u_null)``.

    Args:
        net: average velocity.
        y_null: its null label.
        scale: 1 is none.
    """

    def __init__(self, net: AverageVelocity, y_null: int, scale: float) -> None:
        self.net, self.y_null, self.scale = net, y_null, scale

    def __call__(self, z_t: Tensor, *, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        u_null = self.net(z_t, t=t, r=r, y=torch.full_like(y, self.y_null))
        return u_null + self.scale * (self.net(z_t, t=t, r=r, y=y) - u_null)


def check_sampler(oracle: Oracle, family: Family) -> Checks:
    """Compare our sampler with the official one, HaoyiZhu's and zhuyu-cs'."""
    checks = Checks(oracle)
    net = family.net()
    z_1, y = oracle["z1"], oracle["labels"]
    with torch.no_grad():
        checks.close("schedule2", torch.tensor(time_grid(2), dtype=torch.float64), note="our uniform grid")
        half = oracle["schedule2"].tolist()[1]
        checks.close("steps2_mid", lambda: jump(net, z_1, t=1.0, r=half, y=y))
        checks.close("steps_custom", lambda: sample(net, z_1, y=y, grid=oracle["schedule_custom"].tolist()))
        scales = {found[1] for key in oracle.arrays if (found := re.fullmatch(r"zhuyu_cfg([\d.]+)_steps\d+", key))}
        if not scales:
            checks.add("zhuyu_cfg<scale>_steps*", FAIL, None, None, f"missing arrays in {oracle.name}")
        for steps in (1, 2):
            for prefix in ("", "haoyi_", "zhuyu_"):
                checks.close(f"{prefix}steps{steps}", lambda n=steps: sample(net, z_1, y=y, grid=time_grid(n)))
            for scale in sorted(scales):
                guided = Guided(net, net.y_null, float(scale))
                found = sample(guided, z_1, y=y, grid=time_grid(steps))
                checks.close(f"zhuyu_cfg{scale}_steps{steps}", found)
    return checks
