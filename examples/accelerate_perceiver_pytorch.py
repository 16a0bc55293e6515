"""Trains perceiver-pytorch's Perceiver on scikit-learn's handwritten digits, accelerated in place.

    python examples/accelerate_perceiver_pytorch.py [--epochs 10]

Then compares: the same weights without acceleration give the same predictions, in more time.
Needs perceiver-pytorch and scikit-learn.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from perceiver_pytorch import Perceiver
from sklearn.datasets import load_digits
from torch import Tensor, nn

import perceiver_kernels as pk

SIZE = 32  # the 8 x 8 digits, each pixel repeated
BATCH = 64
TEST = 180


def digits() -> tuple[Tensor, Tensor]:
    """Images (n, SIZE, SIZE, 1) from -1 to 1, and labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return F.interpolate(images, size=(SIZE, SIZE)).permute(0, 2, 3, 1), torch.tensor(data.target)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for epoch in range(epochs):
        for batch in torch.randperm(len(labels)).split(BATCH):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1} of {epochs}, loss {loss.item():.3f}")


@torch.no_grad()
def timed(model: nn.Module, images: Tensor) -> tuple[Tensor, float]:
    """Logits, and the seconds that they took."""
    model(images[:BATCH])
    start = time.perf_counter()
    logits = torch.cat([model(batch) for batch in images.split(BATCH)])
    return logits, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    images, labels = digits()
    model = Perceiver(
        input_channels=1,
        num_freq_bands=16,
        max_freq=32.0,
        depth=2,
        num_latents=32,
        latent_dim=64,
        latent_heads=4,
        latent_dim_head=16,
        num_classes=10,
    )
    print(pk.accelerate(model))
    train(model, images[TEST:], labels[TEST:], epochs)
    model.eval()
    ours, seconds = timed(model, images)
    accuracy = (ours[:TEST].argmax(1) == labels[:TEST]).double().mean()
    pk.restore(model)
    theirs, more_seconds = timed(model, images)
    print(f"test accuracy {accuracy:.1%}")
    print(f"largest difference of logits without acceleration {(ours - theirs).abs().max():.1e}")
    print(f"inference {seconds:.2f} s accelerated, {more_seconds:.2f} s without")


if __name__ == "__main__":
    main()
