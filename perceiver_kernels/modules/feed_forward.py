"""The pre-norm gated MLP of a Perceiver block; the caller adds the residual."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_kernels.ops.feed_forward import feed_forward


class GEGLU(nn.Module):
    """Halve the channels: the first half times the exact (erf) GELU of the second."""

    def forward(self, x: Tensor) -> Tensor:
        values, gates = x.chunk(2, dim=-1)
        return values * F.gelu(gates)


class GatedMLP(nn.Module):
    """Linear to 2 * mult * dim channels, GEGLU, Linear back to dim, dropout."""

    def __init__(
        self,
        dim: int,
        *,
        mult: int = 4,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, 2 * mult * dim, device=device, dtype=dtype),
            GEGLU(),
            nn.Linear(mult * dim, dim, device=device, dtype=dtype),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class FeedForward(nn.Module):
    """LayerNorm, then a GEGLU MLP; the residual is the caller's.

    out = W2 (a * gelu(b)) + b2  with  [a ; b] = W1 LayerNorm(x) + b1.

    Args:
        dim: channels in and out.
        mult: hidden channels per channel, after the gate.
        dropout: probability of dropping an output element in training.
        eps: of the LayerNorm.

    Parameters are named norm, fn.net.0 and fn.net.2, as in perceiver-pytorch.
    """

    def __init__(
        self,
        dim: int,
        *,
        mult: int = 4,
        dropout: float = 0.0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fn = GatedMLP(dim, mult=mult, dropout=dropout, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, eps=eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., dim)."""
        first, last, dropout = self.fn.net[0], self.fn.net[2], self.fn.net[3]
        if type(first) is not nn.Linear or type(last) is not nn.Linear:  # replaced: by an adapter, or quantised
            return self.fn(self.norm(x))
        out = feed_forward(
            x, self.norm.weight, self.norm.bias, first.weight, first.bias, last.weight, last.bias, eps=self.norm.eps
        )
        return dropout(out)
