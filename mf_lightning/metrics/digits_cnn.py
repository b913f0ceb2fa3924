"""A small digit classifier, registered with torch-fidelity as the feature extractor ``digits-cnn``.

It gives the quickstart an FID, precision, recall and class accuracy without any download: its weights ship with the
package and ``scripts/train_digit_assets.py`` makes them again. FIDs under this extractor compare only with each other.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from mf_lightning.assets import asset
from mf_lightning.types import UserError

NAME = "digits-cnn"
CHANNELS = 96
IMAGE_SIZE = 32


class DigitsCNN(nn.Module):
    """Four convolutions, an average over the picture and one linear layer: grey digits => features and class logits."""

    def __init__(self) -> None:
        super().__init__()

        def stage(c_in: int, c_out: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())

        self.stages = nn.ModuleList([stage(1, 24), stage(24, 48), stage(48, 64), stage(64, CHANNELS)])
        self.classes = nn.Linear(CHANNELS, 10)

    def forward(self, grey: Tensor) -> tuple[Tensor, Tensor]:
        """Return features, (B, 96), and logits, (B, 10), of grey images in [0, 1], (B, 1, 32, 32).

        As in FID's Inception, the features are the last convolution averaged over the picture, and the classes a linear
        function of them.
        """
        x = grey
        for stage in self.stages[:-1]:
            x = F.max_pool2d(stage(x), 2)  # 32 -> 16 -> 8 -> 4
        features = self.stages[-1](x).mean(dim=(2, 3))
        return features, self.classes(features)


class FeatureExtractorDigits(FeatureExtractorBase):
    """``DigitsCNN`` behind torch-fidelity's interface: uint8 RGB images in, a tuple of features out."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs):
        from safetensors.torch import load_file

        super().__init__(name, features_list)
        path = feature_extractor_weights_path or asset("digits/cnn.safetensors")
        self.cnn = DigitsCNN()
        self.cnn.load_state_dict(load_file(Path(path)))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return str(CHANNELS), "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else str(CHANNELS)

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(4, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        if input.dtype != torch.uint8 or tuple(input.shape[1:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise UserError(
                f"The extractor '{NAME}' got {input.dtype} images of shape {tuple(input.shape[1:])}, expected uint8 of "
                f"shape (3, {IMAGE_SIZE}, {IMAGE_SIZE}). Use another extractor for other images, for example "
                "inception-v3-compat."
            )
        grey = input.to(self.cnn.classes.weight.dtype).mean(1, keepdim=True) / 255
        features, logits = self.cnn(grey)
        found = {str(CHANNELS): features, "logits": logits}
        return tuple(found[name] for name in self.features_list)
