"""From weights to pictures: a checkpoint, or what `export` made of one, as something to call."""

from mf_lightning.pipeline.pipeline import Generated, MeanFlowPipeline

__all__ = ["Generated", "MeanFlowPipeline"]
