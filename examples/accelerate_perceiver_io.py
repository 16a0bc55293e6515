"""Trains krasserm's perceiver-io to tell Python, C++ and reStructuredText apart, byte by byte.

    python examples/accelerate_perceiver_io.py [--steps 300]

The texts are files of installed packages, every fourth of them kept for the test. Then compares with the same weights
without acceleration.
Needs perceiver-io, fairscale and scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import sklearn.datasets
import torch
import torch.nn.functional as F
from perceiver.model.core import (
    ClassificationOutputAdapter,
    PerceiverDecoder,
    PerceiverEncoder,
    PerceiverIO,
    TrainableQueryProvider,
)
from perceiver.model.core.adapter import TokenInputAdapter
from torch import Tensor, nn

import perceiver_kernels as pk

LENGTH = 256  # bytes of a passage
BATCH = 32


def texts() -> dict[str, list[Tensor]]:
    """By language, the bytes of files that come with Python, torch and scikit-learn."""
    folders = {
        "Python": (Path(json.__file__).parents[1], "*.py"),
        "C++": (Path(torch.__file__).parent / "include" / "ATen" / "core", "*.h"),
        "reStructuredText": (Path(sklearn.datasets.__file__).parent / "descr", "*.rst"),
    }
    found = {}
    for language, (folder, pattern) in folders.items():
        contents = (path.read_bytes() for path in sorted(folder.glob(pattern)))
        found[language] = [torch.tensor(list(text)) for text in contents if len(text) > LENGTH][:60]
    return found


def passages(files: list[list[Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Passages (count, LENGTH) from anywhere in the files, and the language of each."""
    labels = torch.randint(len(files), (count,))
    chosen = []
    for label in labels.tolist():
        text = files[label][int(torch.randint(len(files[label]), ()))]
        start = int(torch.randint(len(text) - LENGTH, ()))
        chosen.append(text[start : start + LENGTH])
    return torch.stack(chosen), labels


def classifier(num_classes: int) -> PerceiverIO:
    encoder = PerceiverEncoder(
        TokenInputAdapter(vocab_size=256, max_seq_len=LENGTH, num_input_channels=64),
        num_latents=32,
        num_latent_channels=64,
        num_self_attention_layers_per_block=3,
    )
    decoder = PerceiverDecoder(
        ClassificationOutputAdapter(num_classes, num_output_query_channels=64),
        TrainableQueryProvider(num_queries=1, num_query_channels=64),
        num_latent_channels=64,
    )
    return PerceiverIO(encoder, decoder)


@torch.no_grad()
def timed(model: nn.Module, tokens: Tensor) -> tuple[Tensor, float]:
    """Logits, and the seconds that they took."""
    model(tokens[:BATCH])
    start = time.perf_counter()
    logits = torch.cat([model(batch) for batch in tokens.split(BATCH)])
    return logits, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    files = [*texts().values()]
    training = [[text for i, text in enumerate(language) if i % 4] for language in files]
    model = classifier(len(files))
    print(pk.accelerate(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        tokens, labels = passages(training, BATCH)
        loss = F.cross_entropy(model(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 49:
            print(f"step {step + 1} of {steps}, loss {loss.item():.3f}")
    model.eval()
    tokens, labels = passages([language[::4] for language in files], 512)
    ours, seconds = timed(model, tokens)
    accuracy = (ours.argmax(1) == labels).double().mean()
    pk.restore(model)
    theirs, more_seconds = timed(model, tokens)
    print(f"{accuracy:.1%} of passages from unseen files right; by chance {1 / len(files):.1%}")
    print(f"largest difference of logits without acceleration {(ours - theirs).abs().max():.1e}")
    print(f"inference {seconds:.2f} s accelerated, {more_seconds:.2f} s without")


if __name__ == "__main__":
    main()
