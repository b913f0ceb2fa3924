"""uint8 images <=> latents."""

from mf_lightning.autoencoders.kl import KLAutoencoder
from mf_lightning.autoencoders.pixel import PixelAutoencoder

__all__ = ["KLAutoencoder", "PixelAutoencoder"]
