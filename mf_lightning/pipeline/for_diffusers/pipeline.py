"""A MeanFlow generator as a diffusers pipeline; needs the package mf_lightning.

pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
images = pipe(class_labels=[3, 7], seed=0).images
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from mf_lightning.autoencoders import KLAutoencoder, PixelAutoencoder
from mf_lightning.pipeline import MeanFlowPipeline
from mf_lightning.pipeline.loading import parse_description
from mf_lightning.pipeline.requests import choose_grid


class MeanFlowDiffusionPipeline(DiffusionPipeline):
    """Class-conditional images in one network pass.

    Args:
        transformer: the network.
        vae: decoder of its latents; None for a network of pixels.
    """

    _optional_components = ["vae"]  # noqa: RUF012

    def __init__(self, transformer: torch.nn.Module, vae: AutoencoderKL | None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | int | str | None = None,
        num_images: int | None = None,
        num_inference_steps: int | None = None,
        grid: Sequence[float] | None = None,
        seed: int | Sequence[int] = 0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        sampler: str = "average",
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Return pictures.

        Args:
            class_labels: classes by number or name, taken in turn.
            num_images: None is as many as there are labels or seeds.
            num_inference_steps: network passes for each; None is 1.
            grid: times of the jumps instead, falling from 1 (noise) to 0.
            seed: decides the noise: the pictures are those of ``python -m mf_lightning sample``.
            generator: torch's own noise instead, in the place of ``seed``.
            sampler: "average" jumps; "euler" follows the instantaneous velocity in many passes, for flow-matching networks.
            output_type: "pil", or "np" for (N, H, W, c) float32 in [0, 1].
            return_dict: False returns a tuple.
        """
        if output_type not in ("pil", "np"):
            raise ValueError(f"Got output_type = {output_type!r}, expected 'pil' or 'np'.")
        inner = self._inner()
        noise, y = inner.request(class_labels, n=num_images, seed=seed)
        if generator is not None:
            noise = randn_tensor(noise.shape, generator=generator, device=noise.device, dtype=noise.dtype)
        pixels = inner.generate(noise, y, grid=choose_grid(num_inference_steps, grid), sampler=sampler).pixels
        images = np.moveaxis(pixels.numpy(), 1, -1).astype(np.float32) / 255
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _inner(self) -> MeanFlowPipeline:
        autoencoder = PixelAutoencoder()
        if self.vae is not None:
            autoencoder = KLAutoencoder("vae")
            autoencoder.net = self.vae
        description = parse_description(dict(self.transformer.config.generator))
        return MeanFlowPipeline(self.transformer.net, description, autoencoder)
