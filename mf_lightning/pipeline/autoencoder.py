"""The autoencoder that an id in a data set, or a user, names."""

from __future__ import annotations

from pathlib import Path

from mf_lightning.autoencoders import KLAutoencoder, PixelAutoencoder
from mf_lightning.data.datamodule import same_autoencoder
from mf_lightning.data.shards import DatasetInfo
from mf_lightning.types import Autoencoder, UserError


def open_autoencoder(name: str, info: DatasetInfo) -> Autoencoder:
    """Return the autoencoder of a name or of a data set's id.

    Raises:
        UserError: it is not the one that made the latents, or has another number of channels.
    """
    autoencoder = named_autoencoder(name)
    if not same_autoencoder(autoencoder.id, info.autoencoder):
        raise UserError(
            f"Got the autoencoder {autoencoder.id}, expected {info.autoencoder}, which made these latents. Give that one as "
            "--autoencoder, a local directory or hub name."
        )
    check_channels(autoencoder, info.latent_shape[0])
    return autoencoder


def named_autoencoder(name: str) -> Autoencoder:
    """Return the autoencoder of a local directory, hub name, "pixel", or an id with a checksum behind it."""
    name = name.partition("@")[0] if not Path(name).is_dir() else name
    return PixelAutoencoder() if name == "pixel" else KLAutoencoder(name)


def check_channels(autoencoder: KLAutoencoder | PixelAutoencoder, channels: int) -> None:
    """Refuse an autoencoder that cannot decode latents of so many channels.

    Raises:
        UserError: it decodes another number.
    """
    pixel = isinstance(autoencoder, PixelAutoencoder)
    fits = (1, 3) if pixel else autoencoder.channels[1:]
    if channels not in fits:
        of = ", pictures themselves" if pixel else ""
        raise UserError(
            f"Got the autoencoder {autoencoder.id} for latents of {channels} channels, expected one that decodes these: it "
            f"decodes {' or '.join(map(str, fits))}{of}. Give the one that made the latents as --autoencoder."
        )
