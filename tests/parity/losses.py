"""The loss files: every quantity of one training batch, with the randomness pinned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mf_lightning.flow import AdaptiveWeight, Draw, DropAnyRow, DropFirstRows, Guidance, MeanFlowLoss, total_derivative
from mf_lightning.flow.path import conditional_velocity, interpolate
from mf_lightning.interop import public_sit
from mf_lightning.interop.flax_names import from_flax
from mf_lightning.nets import SiT
from mf_lightning.types import LossTerms
from tests.parity.family import Family
from tests.parity.report import BOUND, OK, Checks, Gradients, MissingArray, Oracle, measure

NOT_GUIDED = "no guidance: the file holds no v_uncond and v_g is e - x, so its omega and kappa are not used"


@dataclass
class Batch:
    """Inputs of one stored training step."""

    x: Tensor
    e: Tensor
    t: Tensor
    r: Tensor
    labels: Tensor
    dropped: Tensor

    @property
    def z_t(self) -> Tensor:
        return interpolate(self.x, self.e, t=self.t)

    def draw(self, dtype: torch.dtype = torch.float32) -> Draw:
        return Draw(e=self.e.to(dtype), t=self.t, r=self.r, dropped=self.dropped)


def read_batch(oracle: Oracle, dropped: Tensor) -> Batch:
    return Batch(*(oracle[key] for key in ("x", "e", "t", "r", "labels")), dropped=dropped.bool())


def run_loss(
    net: SiT, batch: Batch, guidance: Guidance, weight: AdaptiveWeight, dtype: torch.dtype = torch.float32
) -> tuple[LossTerms, Tensor]:
    """Return our loss's terms and the labels that it gave to the network."""
    seen: list[Tensor] = []

    def watch(module, args, kwargs) -> None:
        if torch.is_grad_enabled():  # the gradient forward; guidance runs without
            seen.append(kwargs["y"])

    hook = net.register_forward_pre_hook(watch, with_kwargs=True)
    loss = MeanFlowLoss(guidance=guidance, weight=weight)
    terms = loss(net, batch.x.to(dtype), batch.labels, batch.draw(dtype), y_null=net.y_null)
    hook.remove()
    (y_in,) = seen
    return terms, y_in


def check_haoyi(oracle: Oracle, family: Family) -> Checks:
    """Compare with HaoyiZhu's loss, in float32 and float64."""
    checks = Checks(oracle)
    batch = read_batch(oracle, oracle["drop_mask"])
    guidance, note = _guidance_of(oracle, oracle)
    drop = DropFirstRows(oracle.number("class_dropout_prob"))
    checks.same("drop_mask", lambda: drop(oracle["drop_uniform"]), name="drop_mask (rule)")
    oracle.unread.discard("data_proportion")  # of the sampler, which the stored times replace

    net = family.net()
    terms = _check_fields(checks, net, batch, guidance, oracle.number("norm_eps"), note)
    checks.close("v_loss", terms.velocity_error.mean(), note="batch mean")
    _check_powers(checks, net, batch, guidance, oracle, dict)
    exact = net.double()
    for power in _powers(oracle):
        weight = AdaptiveWeight(power, oracle.number("norm_eps"))
        in_float64, _ = run_loss(exact, batch, guidance, weight, torch.float64)
        checks.close(f"p{power}/loss_f64", in_float64.loss)
    checks.close("loss_raw_f64", in_float64.raw_error)
    return checks


def check_official(oracle: Oracle, family: Family) -> Checks:
    """Compare with the official JAX loss, whose inputs and settings lie in the haoyi file of the same case."""
    checks = Checks(oracle)
    inputs = family.sibling(oracle.name.replace("_official_", "_haoyi_"))
    net = family.net()
    dropped = oracle["y_inp"] == net.y_null if "y_inp" in oracle else inputs["drop_mask"]
    batch = read_batch(inputs, dropped)
    guidance, note = _guidance_of(oracle, inputs)
    terms = _check_fields(checks, net, batch, guidance, inputs.number("norm_eps"), note)
    checks.close("v_loss", terms.velocity_error, note="per sample")
    _check_powers(checks, net, batch, guidance, inputs, from_flax)
    return checks


def check_zhuyu(oracle: Oracle, family: Family) -> Checks:
    """Compare with zhuyu-cs' loss: its target and raw error must agree, its weighting and drop rule are its own."""
    checks = Checks(oracle)
    batch = read_batch(oracle, oracle["drop_mask"])
    low, high = oracle.number("cfg_min_t"), oracle.number("cfg_max_t")
    guidance = Guidance(oracle.number("cfg_omega"), oracle.number("cfg_kappa"), (low, high))
    probability, power = oracle.number("label_dropout_prob"), oracle.number("adaptive_p")
    uniform = oracle["drop_uniform"]
    checks.same("drop_mask", DropAnyRow(probability)(uniform), name="drop_mask (rule: any row)")

    net = family.net()
    terms, y_in = run_loss(net, batch, guidance, AdaptiveWeight(power))
    checks.same("y_inp", y_in)
    checks.close("u_tgt", terms.u_tgt, name="u_tgt (its drop mask)")
    checks.close("loss_mid", terms.raw_error)
    checks.close("loss_mean_ref", terms.raw_error.mean() / batch.x[0].numel())

    batch.dropped = DropFirstRows(probability)(uniform)
    kept = ~(batch.dropped | oracle["drop_mask"].bool())
    ours, _ = run_loss(net, batch, guidance, AdaptiveWeight(power))
    _close_rows(checks, "u_tgt", ours.u_tgt, kept, "u_tgt (our drop rule, rows kept by both)")

    batch.dropped = oracle["drop_mask"].bool()
    note = "weighs by L^2 / (L^2 + 1e-3)^p, L the summed squared error; ours by L / (L + norm_eps)^p"
    checks.deviates("loss_per_sample", _weighted(terms, AdaptiveWeight(power)), note=note)
    checks.deviates("loss_per_sample_p0.5", _weighted(terms, AdaptiveWeight(0.5)), note=note)
    checks.deviates("loss", terms.loss.detach(), note=note)
    mine = _gradients(net, terms.loss)
    checks.gradients("grad", mine, lambda: public_sit.from_zhuyu(oracle.under("grad/")), deviates=note)
    return checks


def _guidance_of(oracle: Oracle, settings: Oracle) -> tuple[Guidance, str]:
    """Return the file's guidance, and a note if its arrays say that none was used: settings are stored anyway."""
    omega, kappa, low, high = (settings.number(key) for key in ("omega", "kappa", "t_start", "t_end"))
    if "v_uncond" not in oracle and oracle["v_g"].equal(conditional_velocity(settings["x"], settings["e"])):
        return Guidance(), NOT_GUIDED
    return Guidance(omega, kappa, (low, high)), ""


def _check_fields(checks: Checks, net: SiT, batch: Batch, guidance: Guidance, norm_eps: float, note: str) -> LossTerms:
    """Compare what does not depend on the weight's power."""
    oracle, guidance_used = checks.oracle, note != NOT_GUIDED
    terms, y_in = run_loss(net, batch, guidance, AdaptiveWeight(norm_eps=norm_eps))
    checks.same("y_inp", y_in)
    checks.close("v_g", terms.v_g, note=note)
    checks.close("u", terms.u)
    checks.close("u_tgt", terms.u_tgt)
    checks.close("loss_raw", terms.raw_error)

    def all_rows() -> Tensor:
        return total_derivative(net, batch.z_t, oracle["v_g"], t=batch.t, r=batch.r, y=y_in)

    def own_tangents() -> Tensor:
        with torch.no_grad():
            return net(batch.z_t, t=batch.t, r=batch.r, y=y_in, v_g=oracle["v_g"])[1]

    checks.close("dudt", all_rows, name="dudt (all rows, torch.func.jvp)")
    checks.close("dudt", own_tangents, name="dudt (all rows, the network's tangents)")
    if "dudt" in oracle:
        jump = batch.r < batch.t
        stored = torch.where(jump, oracle["dudt"].flatten(1).norm(dim=1), 0)
        error, problem = measure(terms.dudt_norm, stored)
        checks.judge("dudt_norm (r != t rows, 0 elsewhere)", error, BOUND, problem)
    if guidance_used:
        null = torch.full_like(batch.labels, net.y_null)
        checks.close("v_uncond", lambda: _velocity(net, batch, null))
        if guidance.kappa != 0:
            checks.close("v_cond", lambda: _velocity(net, batch, batch.labels))
    return terms


def _check_powers(
    checks: Checks,
    net: SiT,
    batch: Batch,
    guidance: Guidance,
    settings: Oracle,
    renamed: Callable[[Gradients], Gradients],
) -> None:
    """Compare the weighted loss and its gradients at every power of the weight."""
    for power in _powers(settings):
        weight = AdaptiveWeight(power, settings.number("norm_eps"))
        terms, _ = run_loss(net, batch, guidance, weight)
        checks.close(f"p{power}/adp_wt", 1 / weight(terms.raw_error))
        checks.close(f"p{power}/loss_weighted", _weighted(terms, weight))
        checks.close(f"p{power}/loss", terms.loss.detach())
        prefix = f"p{power}/grad/"
        mine = _gradients(net, terms.loss)
        checks.gradients(prefix[:-1], mine, lambda prefix=prefix: renamed(checks.oracle.under(prefix)))


def _powers(settings: Oracle) -> list[float]:
    powers = settings["norm_p"].tolist()
    if not powers:
        raise MissingArray(f"missing powers in 'norm_p' of {settings.name}; compute the file again")
    return powers


def _weighted(terms: LossTerms, weight: AdaptiveWeight) -> Tensor:
    return weight(terms.raw_error) * terms.raw_error


def _gradients(net: SiT, loss: Tensor) -> Gradients:
    names, parameters = zip(*net.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@torch.no_grad()
def _velocity(net: SiT, batch: Batch, labels: Tensor) -> Tensor:
    """Return the network's velocity, u at r = t."""
    return net(batch.z_t, t=batch.t, r=batch.t, y=labels)


def _close_rows(checks: Checks, key: str, got: Tensor, rows: Tensor, name: str) -> None:
    """Compare some rows of a field with a stored one."""
    if not bool(rows.any()):
        return checks.add(name, OK, None, None, "no such rows in this file")
    error, problem = measure(got[rows], checks.oracle[key][rows])
    return checks.judge(name, error, BOUND, problem or f"{int(rows.sum())} rows")
