"""The pre-norm MLP of a Perceiver block."""

import math
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_kernels.modules.projection import is_plain, is_stock
from perceiver_kernels.ops.feed_forward import feed_forward


class GEGLU(nn.Module):
    """Halve the channels: the first half times the exact (erf) GELU of the second."""

    def forward(self, x: Tensor) -> Tensor:
        values, gates = x.chunk(2, dim=-1)
        return values * F.gelu(gates)


class MLP(nn.Module):
    """Linear to mult * dim channels (twice as many for a gate), activation, linear back to dim, dropout."""

    def __init__(
        self,
        dim: int,
        *,
        mult: int = 4,
        activation: Literal["geglu", "gelu"] = "geglu",
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ("geglu", "gelu"):
            raise ValueError(f'activation is {activation!r}, but must be "geglu" or "gelu"')
        gated = activation == "geglu"
        self.activation = activation
        self.net = nn.Sequential(
            nn.Linear(dim, (2 if gated else 1) * mult * dim, device=device, dtype=dtype),
            GEGLU() if gated else nn.GELU(),
            nn.Linear(mult * dim, dim, device=device, dtype=dtype),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class FeedForward(nn.Module):
    """LayerNorm, then an MLP: by default the gated one of perceiver-pytorch.

    out = W2 f(W1 LayerNorm(x) + b1) + b2 + residual,  f([a ; b]) = a * gelu(b) for "geglu"

    Args:
        dim: channels in and out.
        mult: hidden channels per channel, after the gate.
        activation: "geglu", or "gelu" without a gate, as in the released models; both of the error function.
        dropout: probability of dropping an output element in training, before the residual.
        eps: of the LayerNorm.
        save_hidden: whether training keeps the product with W1 for backward; otherwise it is computed again, two ninths
            more multiply-adds in a training step ("gelu": a sixth), and saves (batch, N, hidden) floats per layer. A
            number keeps a product of up to so many bytes.

    Parameters are named norm, fn.net.0 and fn.net.2, as in perceiver-pytorch. Where one of these modules has been
    replaced or hooked into, all of them run one after the other.
    """

    def __init__(
        self,
        dim: int,
        *,
        mult: int = 4,
        activation: Literal["geglu", "gelu"] = "geglu",
        dropout: float = 0.0,
        eps: float = 1e-5,
        save_hidden: bool | float = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.save_hidden = save_hidden
        self.fn = MLP(dim, mult=mult, activation=activation, dropout=dropout, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, eps=eps, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """Map (..., dim) to (..., dim) and add the residual, of the result's shape."""
        weights = self.weights()
        if weights is None:
            out = self.fn(self.norm(x))
            return out if residual is None else out + residual
        return feed_forward(
            x,
            *weights,
            activation=self.fn.activation,
            eps=self.norm.eps,
            residual=residual,
            save_hidden=self._saves_hidden(x),
        )

    def weights(self) -> tuple[Any, ...] | None:
        """What `feed_forward` takes of the parameters, or None where they do not stand for the modules."""
        first, last, dropout = self.fn.net[0], self.fn.net[2], self.fn.net[3]
        drops = isinstance(dropout, nn.Dropout) and self.training and dropout.p > 0
        if drops or not self._is_stock() or not is_plain(first) or not is_plain(last):
            return None
        return self.norm.weight, self.norm.bias, first.weight, first.bias, last.weight, last.bias

    def _saves_hidden(self, x: Tensor) -> bool:
        if isinstance(self.save_hidden, bool):
            return self.save_hidden
        rows, hidden = math.prod(x.shape[:-1]), cast(nn.Linear, self.fn.net[0]).out_features
        return rows * hidden * x.element_size() <= self.save_hidden

    def _is_stock(self) -> bool:
        """Whether LayerNorm, activation and dropout, and what holds them, are as this class made them."""
        activation = GEGLU if self.fn.activation == "geglu" else nn.GELU
        return (
            is_stock(self.norm, nn.LayerNorm)
            and is_stock(self.fn, MLP)
            and is_stock(self.fn.net, nn.Sequential)
            and is_stock(self.fn.net[1], activation)
            and is_stock(self.fn.net[3], nn.Dropout)
        )
