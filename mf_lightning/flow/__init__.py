"""The paper: path, times, guidance, JVP, loss and sampler. Torch only; nothing here assumes pictures or a trainer."""

from mf_lightning.flow.gaussian import GaussianFlow
from mf_lightning.flow.guidance import Guidance, GuidanceSchedule, GuidanceStage
from mf_lightning.flow.jvp import total_derivative
from mf_lightning.flow.labels import DropAnyRow, DropFirstRows
from mf_lightning.flow.meanflow import MeanFlowLoss, u_target
from mf_lightning.flow.passes import Passes
from mf_lightning.flow.rows import Draw
from mf_lightning.flow.sampler import AverageSampler, CountedPasses, EulerSampler, Sampler, jump, sample, time_grid
from mf_lightning.flow.times import LogitNormal, TwoLogitNormals, Uniform
from mf_lightning.flow.weighting import AdaptiveWeight

__all__ = [
    "AdaptiveWeight",
    "AverageSampler",
    "CountedPasses",
    "Draw",
    "DropAnyRow",
    "DropFirstRows",
    "EulerSampler",
    "GaussianFlow",
    "Guidance",
    "GuidanceSchedule",
    "GuidanceStage",
    "LogitNormal",
    "MeanFlowLoss",
    "Passes",
    "Sampler",
    "TwoLogitNormals",
    "Uniform",
    "jump",
    "sample",
    "time_grid",
    "total_derivative",
    "u_target",
]
