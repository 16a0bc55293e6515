"""What an integration asks of a module's parts before it computes with their parameters, and an MLP computed so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from perceiver_kernels.modules.projection import is_stock
from perceiver_kernels.ops.feed_forward import feed_forward


@dataclass(frozen=True)
class Part:
    """A submodule by its name in the swapped module, and the class that it must be of."""

    name: str
    module: nn.Module | None
    kind: type[nn.Module]

    @property
    def is_stock(self) -> bool:
        if self.module is None or not is_stock(self.module, self.kind):
            return False
        # Quantised or distributed weights are tensors of classes of their own.
        return self.kind is not nn.Linear or type(self.module.weight) in (nn.Parameter, Tensor)


def all_stock(parts: Iterable[Part]) -> bool:
    """Whether all parts are of their very classes and without hooks, so that their parameters stand for them."""
    return all(part.is_stock for part in parts)


def obstacle(parts: Iterable[Part]) -> str | None:
    """Why the parts cannot be computed with, in words, or None."""
    for part in parts:
        if not part.is_stock:
            expected = f"must be {part.kind.__name__}, not wrapped, and without hooks"
            return f"{part.name} is {type(part.module).__name__}, {expected}"
    return None


def pre_norm_mlp(
    x: Tensor,
    norm: nn.LayerNorm,
    first: nn.Linear,
    last: nn.Linear,
    *,
    activation: str,
    residual: Tensor | None = None,
) -> Tensor:
    """last( activation( first( norm(x) ) ) ) + residual, by one operator from the parameters of these modules."""
    weights = (norm.weight, norm.bias, first.weight, first.bias, last.weight, last.bias)
    return feed_forward(x, *weights, activation=activation, eps=norm.eps, residual=residual)
