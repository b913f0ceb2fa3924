"""mf_lightning: train one-step image generators with MeanFlow (arXiv 2505.13447) on PyTorch Lightning."""

__version__ = "0.1.0"
