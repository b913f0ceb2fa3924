"""Latents on disk and in batches."""

from mf_lightning.data.datamodule import LatentData, LatentDataModule
from mf_lightning.data.shards import DatasetInfo, read_info
from mf_lightning.data.synthetic import SevenSegmentDataModule

__all__ = ["DatasetInfo", "LatentData", "LatentDataModule", "SevenSegmentDataModule", "read_info"]
