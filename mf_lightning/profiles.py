"""Profiles of power-function averages: how much each step weighs in an average, in closed form (EDM2, arXiv 2312.02696).

The profile of width ``sigma_rel`` at step ``t`` is ``p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)`` on (0, t]: its integral
is 1 and its standard deviation ``sigma_rel t``. The average kept in training weighs step i by the
integral of p over (i - 1, i].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mf_lightning.types import UserError

WIDEST = 1 / math.sqrt(12)
"""Width of the plain mean of all steps (gamma = 0); wider profiles would weigh the first steps most."""


class Fit(NamedTuple):
    """A profile as a sum of stored ones."""

    factors: np.ndarray
    """Of the stored profiles, (K,); their sum is 1."""
    error: float
    """L2 norm of the difference from the profile that was asked for, over that profile's norm."""


def check_width(sigma_rel: float, what: str) -> float:
    """Return a width that a profile can have.

    Raises:
        UserError: it is not in (0, 0.2886].
    """
    if not 0 < sigma_rel <= WIDEST:
        raise UserError(
            f"Got {what} = {sigma_rel}, expected a number in (0, 0.2886]: the profile's standard deviation over the training's "
            "length. 0.05 and 0.1 are usual; at 0.2886 all steps weigh the same."
        )
    return sigma_rel


def exponent(sigma_rel: float) -> float:
    """Return ``gamma`` of a width: the largest root of ``(g + 2)^2 (g + 3) = (g + 1) / sigma_rel^2`` (EDM2, appendix C)."""
    inverse = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


def width(gamma: float) -> float:
    """Return ``sigma_rel = (g + 1)^(1/2) (g + 2)^(-1) (g + 3)^(-1/2)`` of an exponent: the opposite of :func:`exponent`."""
    return math.sqrt(gamma + 1) / (gamma + 2) / math.sqrt(gamma + 3)


def newest_share(step: int, gamma: float) -> float:
    """Return what the weights after optimizer step ``step`` (from 1) count in the average: ``1 - (1 - 1/step)^(gamma + 1)``."""
    return 1.0 if step == 1 else -math.expm1((gamma + 1) * math.log1p(-1 / step))


def step_weights(step: int, gamma: float) -> np.ndarray:
    """Return what each of the steps 1 to ``step`` counts in the average kept in training, (step,); the sum is 1."""
    return np.diff((np.arange(step + 1) / step) ** (gamma + 1))


def inner_products(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Return ``integral p_a(tau) p_b(tau) dtau`` of profiles that end at steps t_a, t_b; arrays are broadcast."""
    both = gamma_a + gamma_b + 1
    logarithm = both * np.log(np.minimum(t_a, t_b)) - (gamma_a + 1) * np.log(t_a) - (gamma_b + 1) * np.log(t_b)
    return (gamma_a + 1) * (gamma_b + 1) / both * np.exp(logarithm)


def fit_profile(stored: Sequence[tuple[int, float]], step: int, sigma_rel: float) -> Fit:
    """Return the sum of stored profiles nearest to another in L2, among sums of factors that add up to 1 (EDM2, algorithm 3).

    EDM2 leaves the factors' sum free; held at 1, a parameter that never moved is given back as it is; the error hardly grows.

    Args:
        stored: (step, sigma_rel) of each, at least one.
        step: at which the wanted profile ends, in optimizer steps.
        sigma_rel: its width.
    """
    if (step, sigma_rel) in stored:
        return Fit(np.array([float(each == (step, sigma_rel)) for each in stored]), 0.0)
    t = np.array([each[0] for each in stored], dtype=np.float64)
    gamma = np.array([exponent(each[1]) for each in stored])
    wanted = np.float64(step), np.float64(exponent(sigma_rel))
    products = inner_products(t[:, None], gamma[:, None], t, gamma)
    with_wanted, own = inner_products(t, gamma, *wanted), float(inner_products(*wanted, *wanted))
    norms = np.sqrt(np.diag(products))  # equations for profiles of norm 1, and a row for the sum of factors
    row = 1 / norms / np.linalg.norm(1 / norms)
    equations = np.block([[products / norms[:, None] / norms, row[:, None]], [row, np.zeros((1, 1))]])
    right = np.append(with_wanted / norms, 1 / np.linalg.norm(1 / norms))
    factors = np.linalg.lstsq(equations, right, rcond=1e-12)[0][:-1] / norms
    left = own - 2 * factors @ with_wanted + factors @ products @ factors
    return Fit(factors, math.sqrt(max(0.0, left) / own))
