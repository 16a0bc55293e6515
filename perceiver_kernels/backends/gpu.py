"""What kernels for GPUs ask of torch, whoever compiles them."""

from __future__ import annotations

from functools import cache

import torch


def tf32_allowed() -> bool:
    """Whether torch's settings let products of float32 matrices run as TensorFloat-32."""
    try:
        return torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # where it was set in torch's newer way, the older one refuses to be read
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; on a CPU, where kernels are interpreted or emulated, few, so that small shapes are divided too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
