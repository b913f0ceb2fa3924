"""torch-fidelity's feature extractors: uint8 images => features, with the extractor's own resize."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from mf_lightning.metrics import digits_cnn, dinov2
from mf_lightning.types import UserError

if digits_cnn.NAME not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(digits_cnn.NAME, digits_cnn.FeatureExtractorDigits)
for _name in dinov2.MODELS:
    FEATURE_EXTRACTORS_REGISTRY[_name] = dinov2.FeatureExtractorDinoV2File

SPATIAL = "spatial"
"""Layer of sFID: the first 7 channels of the first branch of Inception's third 17x17 block, 17 x 17 x 7 = 2,023 features."""
SPATIAL_CHANNELS = 7
_BEHIND_SPATIAL = ("768", "2048", "logits_unbiased", "logits")
_SPATIAL_BLOCK = "Mixed_6d"  # "mixed_6" of the TensorFlow graph, whose tensor "mixed_6/conv:0" ADM's evaluator reads


class Extractor:
    """One of torch-fidelity's registered extractors, ready to use.

    Args:
        name: ``inception-v3-compat`` (the field's FID), ``digits-cnn`` (the quickstart's), or any registered name.
        weights: file of weights; null takes the extractor's own, which most download on first use.
        layer: features for FID, precision, recall and KID; null is the extractor's default (2048 for Inception).
        class_layer: layer of class logits, for class accuracy; null does without.
        score_layer: layer of class logits for the Inception Score; null does without.
        spatial: also return sFID's features as layer "spatial", flattened in the order height, width, channel as ADM does.
        option: group of options that messages name.

    Raises:
        UserError: unknown name or layer, weights that are missing, unreadable or cannot be downloaded.
    """

    def __init__(
        self,
        name: str,
        *,
        weights: str | None = None,
        layer: str | None = None,
        class_layer: str | None = None,
        score_layer: str | None = None,
        spatial: bool = False,
        option: str = "sample_eval.extractor_weights",
    ) -> None:
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            known = ", ".join(FEATURE_EXTRACTORS_REGISTRY)
            raise UserError(f"Got the feature extractor '{name}', expected one of {known}.")
        kind = FEATURE_EXTRACTORS_REGISTRY[name]
        self.name = name
        self.layer = kind.get_default_feature_layer_for_metric("fid") if layer is None else layer
        self.class_layer = class_layer
        self.score_layer = score_layer
        self.spatial = spatial
        self.option = option
        self.layers = list(dict.fromkeys(layer for layer in (self.layer, class_layer, score_layer) if layer is not None))
        if spatial and not self.provides_spatial(name):
            raise UserError(
                f"Got sFID with the feature extractor '{name}', expected an Inception: its features are a layer of that "
                "network. Leave sfid out of the metrics."
            )
        if spatial and not set(self.layers) & set(_BEHIND_SPATIAL):  # the network stops at the last layer that is asked for
            self.layers.append(_BEHIND_SPATIAL[0])
        unknown = [layer for layer in self.layers if layer not in kind.get_provided_features_list()]
        if unknown:
            provided = ", ".join(kind.get_provided_features_list())
            raise UserError(f"Got the layer '{unknown[0]}' of '{name}', expected one of {provided}.")
        if weights is not None and not Path(weights).is_file():
            raise UserError(f"Got the extractor weights '{weights}', which is no file, expected weights of '{name}'.")
        self.net = self._create(weights)
        self._seen: Tensor | None = None
        if spatial:
            getattr(self.net, _SPATIAL_BLOCK).branch1x1.register_forward_hook(self._keep_spatial)
        self.device = torch.device("cpu")
        self.dim: int = self._probe_dim()

    @staticmethod
    def provides_spatial(name: str) -> bool:
        """Tell whether an extractor has sFID's layer."""
        return name == "inception-v3-compat"

    @staticmethod
    def default_score_layer(name: str) -> str | None:
        """Return the layer that torch-fidelity's Inception Score reads; None of an unknown one and one without class logits."""
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            return None
        layer = FEATURE_EXTRACTORS_REGISTRY[name].get_default_feature_layer_for_metric("isc")
        return layer if "logits" in layer else None

    def _keep_spatial(self, module, inputs, output: Tensor) -> None:
        self._seen = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).to(torch.float32)

    def _create(self, weights: str | None):
        from pickle import UnpicklingError
        from urllib.error import URLError

        from safetensors import SafetensorError

        try:
            if weights is not None and self.name != digits_cnn.NAME:  # torch-fidelity would run code that is in it
                torch.load(weights, map_location="meta", weights_only=True)
            return create_feature_extractor(
                self.name, self.layers, cuda=False, feature_extractor_weights_path=weights, verbose=False
            )
        except (URLError, OSError, RuntimeError, UnpicklingError, SafetensorError, ImportError) as error:
            reason = " ".join(str(error).split())[:200] if str(error) else type(error).__name__
            where = "its default weights, which are downloaded" if weights is None else f"weights from '{weights}'"
            raise UserError(
                f"Got no feature extractor '{self.name}' with {where} ({reason}), expected weights to evaluate with. Give "
                f"a local file as {self.option}, or do without the figures that need them."
            ) from error

    @cached_property
    def checksum(self) -> str:
        """Return what names the weights: 16 hexadecimal digits of their values."""
        digest = hashlib.sha256()
        for _, value in sorted(self.net.state_dict().items()):
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _probe_dim(self) -> int:
        return self.features(self.net.get_dummy_input_for_compile())[self.layer].shape[1]

    def to(self, device: torch.device) -> Extractor:
        """Move the weights and return the extractor."""
        self.net.to(device)
        self.device = device
        return self

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return features by layer, each (B, D) float32, of uint8 images, (B, 1 or 3, H, W); grey is repeated to RGB.

        Raises:
            UserError: images that are not uint8 with 1 or 3 channels.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise UserError(
                f"Got {images.dtype} images of shape {tuple(images.shape)}, expected uint8 of shape (B, 1 or 3, H, W)."
            )
        rgb = images.expand(-1, 3, -1, -1).to(self.device)
        found = dict(self.net.convert_features_tuple_to_dict(self.net(rgb)))
        return {**found, SPATIAL: self._seen} if self.spatial else found
