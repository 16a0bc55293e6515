"""Trains krasserm's perceiver-io to tell which of scikit-learn's data set descriptions a passage of text is from.

    python examples/accelerate_perceiver_io.py [--steps 200]

The text is read byte by byte. Then compares with the same weights without acceleration.
Needs perceiver-io, fairscale and scikit-learn.
"""

from __future__ import annotations

import argparse
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


def descriptions() -> list[Tensor]:
    """The bytes of each description that has at least 2,000."""
    folder = Path(sklearn.datasets.__file__).parent / "descr"
    texts = [path.read_bytes() for path in sorted(folder.glob("*.rst"))]
    return [torch.tensor(list(text)) for text in texts if len(text) >= 2000]


def passages(texts: list[Tensor], count: int, first: float, last: float) -> tuple[Tensor, Tensor]:
    """Passages (count, LENGTH) from a part of each text, and which text each is from."""
    labels = torch.randint(len(texts), (count,))
    chosen = []
    for label in labels.tolist():
        text = texts[label]
        start = int(first * len(text)) + int(torch.rand(()) * ((last - first) * len(text) - LENGTH))
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
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    texts = descriptions()
    model = classifier(len(texts))
    print(pk.accelerate(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        tokens, labels = passages(texts, BATCH, 0.0, 0.7)
        loss = F.cross_entropy(model(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 49:
            print(f"step {step + 1} of {steps}, loss {loss.item():.3f}")
    model.eval()
    tokens, labels = passages(texts, 512, 0.7, 1.0)
    ours, seconds = timed(model, tokens)
    accuracy = (ours.argmax(1) == labels).double().mean()
    pk.restore(model)
    theirs, more_seconds = timed(model, tokens)
    print(
        f"{accuracy:.1%} of passages from the unseen ends of {len(texts)} texts right; by chance {1 / len(texts):.1%}"
    )
    print(f"largest difference of logits without acceleration {(ours - theirs).abs().max():.1e}")
    print(f"inference {seconds:.2f} s accelerated, {more_seconds:.2f} s without")


if __name__ == "__main__":
    main()
