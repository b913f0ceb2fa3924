"""The network: sizes, names, initial values, embeddings, and equality of its two attention forms."""

import pytest
import torch

from mf_lightning.nets import SIZES, SiT
from mf_lightning.types import LatentSpec, UserError
from tests.nets import SHAPE, randomise, tiny_sit

IMAGENET = LatentSpec((4, 32, 32), 1000)


@pytest.mark.parametrize(
    ("size", "patch", "millions"), [("B", 4, 131), ("B", 2, 131), ("M", 2, 308), ("L", 2, 459), ("XL", 2, 676)]
)
def test_parameter_counts_are_the_papers(size, patch, millions):
    with torch.device("meta"):
        net = SiT.of_size(size, IMAGENET, patch_size=patch)
    count = sum(p.numel() for p in net.parameters())
    assert abs(count / 1e6 - millions) < 0.01 * millions


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_every_size_and_patch_builds(patch):
    for size in SIZES:
        with torch.device("meta"):
            assert SiT.of_size(size, IMAGENET, patch_size=patch).grid == (32 // patch, 32 // patch)


def test_names_are_those_of_the_public_checkpoints():
    names = set(tiny_sit().state_dict())
    for name in (
        "pos_embed",
        "x_embedder.proj.weight",
        "t_embedder.mlp.0.weight",
        "t_embedder.mlp.2.bias",
        "h_embedder.mlp.0.weight",
        "y_embedder.embedding_table.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.bias",
        "blocks.1.mlp.fc1.weight",
        "blocks.0.adaLN_modulation.1.weight",
        "final_layer.linear.weight",
        "final_layer.adaLN_modulation.1.bias",
    ):
        assert name in names
    assert len(names) == 16 + 10 * 2


def test_initial_values():
    net = SiT(LatentSpec((4, 16, 16), 10), depth=2, hidden_size=64, num_heads=4)
    for embedder in (net.t_embedder, net.h_embedder):
        for layer in (embedder.mlp[0], embedder.mlp[2]):
            assert abs(layer.weight.std().item() - 0.02) < 0.002
            assert (layer.bias == 0).all()
    for module in (
        *(b.adaLN_modulation[1] for b in net.blocks),
        net.final_layer.adaLN_modulation[1],
        net.final_layer.linear,
    ):
        assert (module.weight == 0).all()
        assert (module.bias == 0).all()
    assert net.blocks[0].attn.qkv.weight.std() > 0.05
    z = torch.randn(2, 4, 16, 16)
    assert (net(z, t=torch.ones(2), r=torch.zeros(2), y=torch.zeros(2, dtype=torch.int64)) == 0).all()


@pytest.mark.parametrize(
    ("time_inputs", "blind_to"), [("t,h", None), ("t,r", None), ("t,r,h", None), ("h", "a common shift of t and r")]
)
def test_time_inputs(time_inputs, blind_to):
    net = tiny_sit(time_inputs=time_inputs)
    z, y = torch.randn(3, *SHAPE, dtype=torch.float64), torch.tensor([0, 1, 2])
    t, r = torch.tensor([0.9, 0.5, 0.8]).double(), torch.tensor([0.1, 0.2, 0.3]).double()
    u = net(z, t=t, r=r, y=y)
    assert not torch.allclose(u, net(z, t=t, r=r - 0.1, y=y))
    shifted = net(z, t=t - 0.1, r=r - 0.1, y=y)
    assert torch.allclose(u, shifted, atol=1e-12) == (blind_to is not None)


def test_t_and_r_cannot_be_given_by_position():
    net = tiny_sit()
    with pytest.raises(TypeError):
        net(torch.zeros(1, *SHAPE), torch.ones(1), torch.zeros(1), None)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_fused_attention_equals_math_attention(qk_norm):
    fused, math = (tiny_sit(attention=kind, qk_norm=qk_norm) for kind in ("fused", "math"))
    z, y = torch.randn(3, *SHAPE, dtype=torch.float64), torch.tensor([0, 1, 4])
    t = torch.tensor([0.9, 0.5, 0.8]).double()
    assert torch.allclose(fused(z, t=t, r=t / 2, y=y), math(z, t=t, r=t / 2, y=y), rtol=1e-12)


def test_patches_there_and_back():
    """A network whose layers pass patches through gives the picture back."""
    net = tiny_sit()
    patches = torch.randn(2, *SHAPE, dtype=torch.float64)
    p = net.patch_size
    n, c, h, w = patches.shape
    tokens = patches.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(n, -1, p * p * c)
    assert torch.equal(net.unpatchify(tokens), patches)


def test_rectangles_work():
    net = randomise(SiT(LatentSpec((2, 4, 8), 3), patch_size=2, depth=1, hidden_size=8, num_heads=2))
    z = torch.randn(2, 2, 4, 8)
    assert net(z, t=torch.ones(2), r=torch.zeros(2), y=torch.tensor([0, 3])).shape == z.shape


def test_unconditional():
    net = tiny_sit(num_classes=0)
    assert net.y_null is None
    assert not any(name.startswith("y_embedder") for name in net.state_dict())
    z = torch.randn(2, *SHAPE, dtype=torch.float64)
    assert net(z, t=torch.ones(2).double(), r=torch.zeros(2).double(), y=None).shape == z.shape


def test_class_count_comes_from_the_data_or_is_checked():
    spec = LatentSpec(SHAPE, 7)
    small = {"patch_size": 4, "depth": 1, "hidden_size": 8, "num_heads": 2}
    assert SiT(spec, **small).y_null == 7
    assert SiT(spec, num_classes=7, **small).y_null == 7
    assert SiT(spec, num_classes=0, **small).y_null is None
    with pytest.raises(UserError, match=r"Got num_classes = 5 .* expected the data set's 7"):
        SiT(spec, num_classes=5, **small)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 3}, "patch_size = 3"),
        ({"hidden_size": 18, "num_heads": 4}, "multiple of num_heads"),
        ({"time_inputs": "r,t"}, "time_inputs = 'r,t'"),
        ({"attention": "flash"}, "attention = 'flash'"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(UserError, match=message):
        SiT(LatentSpec(SHAPE, 4), **{"patch_size": 4, "depth": 1, "hidden_size": 16, "num_heads": 2, **change})


def test_labels_are_asked_for():
    with pytest.raises(UserError, match="Got no labels"):
        tiny_sit()(torch.zeros(1, *SHAPE).double(), t=torch.ones(1).double(), r=torch.zeros(1).double(), y=None)


def test_time_embedding_is_not_rounded_to_low_precision():
    net = tiny_sit(dtype=torch.float32)
    t = torch.tensor([0.5000, 0.5005])
    with torch.autocast("cpu", torch.bfloat16):
        c = net.condition(t=t, r=t, y=torch.tensor([0, 0])).x
    assert not torch.equal(c[0], c[1])
