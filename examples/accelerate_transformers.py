"""Two of transformers' Perceivers, before and after pk.accelerate: a photograph to classify, a stereo pair as a flow.

    python examples/accelerate_transformers.py [--blocks 2] [--size 184 248]

The weights are random (the released ones load with from_pretrained in place of the configuration), so the answers mean
nothing; that they are the same, and how long they take, does. Needs transformers and scikit-image.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from skimage import data, io
from torch import Tensor, nn
from transformers import PerceiverConfig, PerceiverForImageClassificationFourier, PerceiverForOpticalFlow

import perceiver_kernels as pk

WIDENING = {"self_attention_widening_factor": 1, "cross_attention_widening_factor": 1}


def picture(array: np.ndarray, size: tuple[int, int]) -> Tensor:
    """A picture of unsigned bytes as (1, 3, *size), from -1 to 1."""
    image = torch.tensor(array, dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1
    return F.interpolate(image, size=size, mode="bilinear", antialias=True)


def classifier(blocks: int) -> tuple[nn.Module, Tensor]:
    """The ImageNet model with Fourier positions, and a photograph."""
    config = PerceiverConfig(
        num_latents=512, d_latents=1024, num_blocks=blocks, num_self_attends_per_block=6, **WIDENING
    )
    config.num_cross_attention_heads, config.num_labels = 1, 1000
    return PerceiverForImageClassificationFourier(config), picture(data.astronaut(), (224, 224))


def flow(size: tuple[int, int]) -> tuple[nn.Module, Tensor]:
    """The optical flow model, and the two pictures of a stereo pair as its frames: every pixel with its neighbours."""
    config = PerceiverConfig(num_latents=2048, d_latents=512, num_blocks=1, num_self_attends_per_block=24, **WIDENING)
    config.num_cross_attention_heads, config.num_self_attention_heads, config.train_size = 1, 16, list(size)
    frames = [picture(io.imread(f"{data.data_dir}/motorcycle_{side}.png"), size) for side in ("left", "right")]
    patches = [F.unfold(frame, 3, padding=1).unflatten(2, size) for frame in frames]
    return PerceiverForOpticalFlow(config), torch.stack(patches, 1)


@torch.inference_mode()
def timed(call: Callable[[Tensor], object], inputs: Tensor) -> tuple[Tensor, float]:
    """The logits of a model, and the seconds that they took the second time."""
    call(inputs)
    start = time.perf_counter()
    logits = call(inputs).logits  # type: ignore[attr-defined]
    return logits, time.perf_counter() - start


def compare(name: str, model: nn.Module, inputs: Tensor) -> None:
    model.eval()
    expected, before = timed(model, inputs)
    report = pk.accelerate(model)
    actual, after = timed(model, inputs)
    difference = (actual - expected).abs().max() / expected.abs().max()
    print(f"{name}: {len(report.swapped)} modules accelerated, {len(report.left)} left as they are: {report.left}")
    print(f"{name}: {before:.2f} s before, {after:.2f} s after, results differ by {difference:.1e} of the largest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2, help="of the classifier; the released one has 8")
    parser.add_argument("--size", type=int, nargs=2, default=(184, 248), help="of the flow; released: 368 496")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    compare("photograph", *classifier(arguments.blocks))
    compare("stereo pair", *flow(tuple(arguments.size)))


if __name__ == "__main__":
    main()
