"""How float32 matrices are multiplied on GPUs: as torch's own products are."""

from __future__ import annotations

import torch


def tf32_allowed() -> bool:
    """Whether torch's settings let products of float32 matrices run as TensorFloat-32."""
    try:
        return torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # where it was set in torch's newer way, the older one refuses to be read
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
