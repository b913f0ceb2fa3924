"""A faster decoder gives the pictures of the plain one, or is refused; the identity of a data set does not depend on it."""

import pytest
import torch

from mf_lightning.autoencoders import KLAutoencoder
from mf_lightning.pixels import to_uint8
from mf_lightning.types import UserError

DIGITS = "mf_lightning:digits/autoencoder"


def latents(n: int = 12) -> torch.Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 2


def test_channels_last_keeps_the_pictures():
    plain, fast = KLAutoencoder(DIGITS), KLAutoencoder(DIGITS, channels_last=True)
    pixels = fast.decode(latents())
    assert 0.999 <= fast.equal_share <= 1
    assert pixels.is_contiguous()
    assert (to_uint8(pixels) == to_uint8(plain.decode(latents()))).float().mean() >= 0.999
    assert plain.equal_share is None  # nothing to compare
    assert fast.id == plain.id
    images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(fast.encode(images), plain.encode(images))


def test_the_fast_copy_is_made_once_and_follows_the_device():
    fast = KLAutoencoder(DIGITS, channels_last=True)
    fast.decode(latents(2))
    copy = fast._fast_net
    assert fast.to(torch.device("cpu"))._fast_net is copy
    assert fast.net.decoder is not copy.decoder
    assert fast.to(torch.device("meta")) is fast
    assert fast._fast_net is not copy


def test_bfloat16_is_refused_where_it_moves_pictures():
    with pytest.raises(UserError, match=r"decode_dtype = bfloat16, .* which give \d\d.\d\d% of uint8 values .*at least 99.9%"):
        (autoencoder := KLAutoencoder(DIGITS, decode_dtype="bfloat16")).decode(latents())
    with pytest.raises(UserError, match="decode_dtype to float32"):  # and not only the first time
        autoencoder.decode(latents())


def test_bfloat16_is_taken_where_it_keeps_them():
    """A decoder whose pictures are black whatever comes in."""
    autoencoder = KLAutoencoder(DIGITS, decode_dtype="bfloat16", channels_last=True)
    with torch.no_grad():
        autoencoder.net.decoder.conv_out.weight.zero_()
        autoencoder.net.decoder.conv_out.bias.fill_(-2)
    pixels = autoencoder.decode(latents())
    assert autoencoder.equal_share == 1
    assert pixels.dtype == torch.float32


def test_settings_are_checked():
    with pytest.raises(UserError, match="decode_dtype = 'float16', expected one of float32, bfloat16"):
        KLAutoencoder(DIGITS, decode_dtype="float16")
