"""Trains flash-perceiver on a CPU, without flash-attn: handwritten digits of scikit-learn, as sets of points.

    python examples/flash_perceiver_without_flash_attn.py [--epochs 20]

A digit's dark pixels are its tokens, each with its place and its darkness; digits have different numbers of them.
Needs flash-perceiver and scikit-learn.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from perceiver_kernels.integrations.flash_perceiver import without_flash_attn

with without_flash_attn():
    from flash_perceiver import Perceiver

BATCH = 64
TEST = 180


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Points (n, 64, 3), which of them are dark (n, 64), and labels."""
    data = load_digits()
    darkness = torch.tensor(data.images, dtype=torch.float32).flatten(1) / 16
    places = torch.cartesian_prod(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8))
    points = torch.cat((places.expand(len(darkness), -1, -1), darkness[..., None]), dim=-1)
    return points, darkness > 0, torch.tensor(data.target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    points, dark, labels = digits()
    model = Perceiver(
        input_dim=3,
        depth=1,
        output_dim=10,
        output_mode="average",
        num_latents=32,
        latent_dim=64,
        latent_heads=4,
        latent_head_dim=16,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for epoch in range(epochs):
        for batch in (torch.randperm(len(labels) - TEST) + TEST).split(BATCH):
            loss = F.cross_entropy(model(points[batch], mask=dark[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1} of {epochs}, loss {loss.item():.3f}")
    with torch.no_grad():
        predicted = model.eval()(points[:TEST], mask=dark[:TEST]).argmax(1)
    print(f"test accuracy {(predicted == labels[:TEST]).double().mean():.1%}")


if __name__ == "__main__":
    main()
