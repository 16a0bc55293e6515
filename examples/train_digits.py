"""Trains the same Perceiver twice, by perceiver-pytorch and by this library, on scikit-learn's handwritten digits.

    python examples/train_digits.py [--epochs 20] [--out docs/digits.png]

Same initial weights, same batches, same optimizer. Prints accuracy and time, and draws both loss curves with those of a
second perceiver-pytorch run from another seed: the distance between seeds is the noise to judge by.
Needs perceiver-pytorch, scikit-learn and, for the picture, matplotlib.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field

import perceiver_pytorch
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import perceiver_kernels as pk

ARGUMENTS = {
    "num_freq_bands": 16,
    "max_freq": 32.0,
    "depth": 2,
    "input_channels": 1,
    "input_axis": 2,
    "num_latents": 32,
    "latent_dim": 64,
    "latent_heads": 4,
    "latent_dim_head": 16,
    "self_per_cross_attn": 1,
    "num_classes": 10,
}
SIZE = 32  # the 8 x 8 digits, each pixel repeated, so that the input is an image and not a handful of tokens
BATCH = 64


@dataclass
class Run:
    """What training one model gave."""

    name: str
    losses: list[float] = field(default_factory=list)
    accuracy: float = 0.0
    seconds: float = 0.0


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (n, SIZE, SIZE, 1) and labels, 90 / 10."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=(SIZE, SIZE), mode="nearest").permute(0, 2, 3, 1).contiguous()
    labels = torch.tensor(data.target)
    train, test = train_test_split(range(len(labels)), test_size=0.1, random_state=0, stratify=labels)
    return images[train], labels[train], images[test], labels[test]


def train(name: str, model: nn.Module, data: tuple[Tensor, Tensor, Tensor, Tensor], epochs: int, seed: int) -> Run:
    images, labels, test_images, test_labels = data
    run = Run(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    shuffle = torch.Generator().manual_seed(seed)
    model.train()
    start = time.perf_counter()
    for epoch in range(epochs):
        for batch in torch.randperm(len(labels), generator=shuffle).split(BATCH):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.losses.append(loss.item())
        print(f"{name}: epoch {epoch + 1} of {epochs}, loss {run.losses[-1]:.3f}", end="\r", flush=True)
    run.seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        predicted = torch.cat([model(part).argmax(1) for part in test_images.split(BATCH)])
    run.accuracy = (predicted == test_labels).double().mean().item()
    print(f"{name}: {epochs} epochs in {run.seconds:.1f} s, test accuracy {run.accuracy:.1%}".ljust(70))
    return run


def smoothed(losses: list[float], window: int = 26) -> Tensor:
    """The mean over an epoch's steps, step by step."""
    return torch.tensor(losses).unfold(0, window, 1).mean(1)


def distance(first: Run, second: Run) -> float:
    """Root mean square of the difference of the logarithms of two smoothed loss curves."""
    difference = smoothed(first.losses).log() - smoothed(second.losses).log()
    return difference.square().mean().sqrt().item()


def draw(runs: list[Run], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for run, style in zip(runs, ("-", "--", ":"), strict=True):
        axes.plot(smoothed(run.losses), style, label=f"{run.name}: {run.seconds:.0f} s, {run.accuracy:.1%} right")
    axes.set(xlabel="step", ylabel="training loss, mean over an epoch", yscale="log", title="Handwritten digits")
    axes.legend()
    figure.savefig(path, dpi=120)
    print(f"written: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", metavar="FILE", help="where to draw the curves")
    arguments = parser.parse_args()
    data = digits()
    models = {}
    for seed, name, library in (
        (0, "perceiver-pytorch", perceiver_pytorch),
        (0, "perceiver_kernels", pk),
        (1, "perceiver-pytorch, another seed", perceiver_pytorch),
    ):
        torch.manual_seed(seed)
        models[name] = (library.Perceiver(**ARGUMENTS), seed)
    runs = [train(name, model, data, arguments.epochs, seed) for name, (model, seed) in models.items()]
    peer, ours, other = runs
    print(f"time saved: {1 - ours.seconds / peer.seconds:.0%} ({peer.seconds / ours.seconds:.2f} x as fast)")
    print(f"distance of the loss curves: {distance(peer, ours):.3f}; between two seeds: {distance(peer, other):.3f}")
    if arguments.out:
        draw(runs, arguments.out)


if __name__ == "__main__":
    main()
