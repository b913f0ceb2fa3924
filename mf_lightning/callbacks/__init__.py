"""What happens around the training loop."""

from mf_lightning.callbacks.checkpoint import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint
from mf_lightning.callbacks.csv_log import MetricsCSV
from mf_lightning.callbacks.ema import EMA
from mf_lightning.callbacks.guards import NonFiniteGuard
from mf_lightning.callbacks.heartbeat import Heartbeat
from mf_lightning.callbacks.liveness import Liveness
from mf_lightning.callbacks.power_ema import PowerEMA
from mf_lightning.callbacks.preemption import Preempted, Preemption
from mf_lightning.callbacks.run_summary import RunSummary
from mf_lightning.callbacks.sample_eval import SampleEval
from mf_lightning.callbacks.sample_grid import SampleGrid
from mf_lightning.callbacks.sample_writer import SampleWriter
from mf_lightning.callbacks.self_check import SelfCheck
from mf_lightning.callbacks.spikes import SpikeLog
from mf_lightning.callbacks.throughput import Throughput
from mf_lightning.callbacks.training_bar import TrainingBar
from mf_lightning.callbacks.wandb_log import WandbLog
from mf_lightning.callbacks.wandb_logger import SafeWandbLogger

__all__ = [
    "EMA",
    "AtomicCheckpointIO",
    "BestCheckpoint",
    "Heartbeat",
    "LastCheckpoint",
    "Liveness",
    "MetricsCSV",
    "NonFiniteGuard",
    "PowerEMA",
    "Preempted",
    "Preemption",
    "RunSummary",
    "SafeWandbLogger",
    "SampleEval",
    "SampleGrid",
    "SampleWriter",
    "SelfCheck",
    "SpikeLog",
    "Throughput",
    "TrainingBar",
    "WandbLog",
]
