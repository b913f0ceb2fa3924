"""DINOv2 behind torch-fidelity's interface with weights from a local file, which torch-fidelity 0.4.0 cannot load.

Without a file torch-fidelity's own extractor is used, which downloads network and weights. Given one
(``dinov2_vitl14_pretrain.pth`` and its like, as facebookresearch/dinov2 publishes them) the same network is built by timm;
resize and normalisation are torch-fidelity's. Position embeddings are resized as that repository does it: bicubic, by the
factor (16 + 0.1) / 37.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

MODELS = {
    "dinov2-vit-s-14": "vit_small_patch14_dinov2",
    "dinov2-vit-b-14": "vit_base_patch14_dinov2",
    "dinov2-vit-l-14": "vit_large_patch14_dinov2",
    "dinov2-vit-g-14": "vit_giant_patch14_dinov2",
}
"""torch-fidelity's names and timm's."""
GRID = FeatureExtractorDinoV2.INPUT_IMAGE_SIZE // 14
OFFSET = 0.1  # facebookresearch/dinov2, DinoVisionTransformer.interpolate_offset


class FeatureExtractorDinoV2File(FeatureExtractorDinoV2):
    """torch-fidelity's DINOv2 extractor around a network with weights from a file."""

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        feature_extractor_internal_dtype: str | None = None,
        **kwargs,
    ) -> None:
        if feature_extractor_weights_path is None:
            super().__init__(name, features_list, None, feature_extractor_internal_dtype, **kwargs)
            return
        FeatureExtractorBase.__init__(self, name, features_list)
        self.feature_extractor_internal_dtype = (
            torch.float64 if feature_extractor_internal_dtype == "float64" else torch.float32
        )
        state = torch.load(feature_extractor_weights_path, map_location="cpu", weights_only=True)
        self.model = build(name, state).to(self.feature_extractor_internal_dtype)
        self.requires_grad_(False)
        self.eval()


def build(name: str, state: dict[str, Tensor]) -> nn.Module:
    """Return the network for 224x224 images: the normalised class token, (B, D).

    Args:
        name: torch-fidelity's name of the size.
        state: state dict in the names of facebookresearch/dinov2.

    Raises:
        RuntimeError: names or shapes that are not this network's.
    """
    import timm

    net = timm.create_model(MODELS[name], pretrained=False, img_size=FeatureExtractorDinoV2.INPUT_IMAGE_SIZE, num_classes=0)
    net.load_state_dict(to_timm(state))
    return net


def to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of facebookresearch/dinov2 in timm's names, its position embeddings resized for 224x224."""
    renamed = {}
    for key, value in state.items():
        if key == "mask_token" or key.startswith("head."):
            continue  # only pre-training uses the first; the second is no part of the backbone
        renamed[key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")] = value
    if "pos_embed" in renamed:
        renamed["pos_embed"] = resized_positions(renamed["pos_embed"])
    return renamed


def resized_positions(table: Tensor) -> Tensor:
    """Return position embeddings, (1, 1 + 256, D), of a table, (1, 1 + n^2, D)."""
    cls, grid = table[:, :1].float(), table[:, 1:].float()
    side = math.isqrt(grid.shape[1])
    if side == GRID:
        return table
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=((GRID + OFFSET) / side,) * 2, mode="bicubic", antialias=False)
    return torch.cat([cls, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
