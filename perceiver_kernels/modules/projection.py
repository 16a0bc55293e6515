"""Linear layers inside this library's modules, run by its operators where nothing stands in the way."""

from typing import TypeGuard

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from perceiver_kernels.ops.linear import linear


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is an nn.Linear as it came, not replaced (by an adapter, or quantised) and without hooks.

    Parametrised weights are no obstacle: what they come to is read like any other.
    """
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    )
    is_linear = type(layer) is nn.Linear or type_before_parametrizations(layer) is nn.Linear
    return is_linear and not any(hooks) and "forward" not in layer.__dict__


def project(layer: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """layer(x) + residual, the addition inside the operator where layer is a plain nn.Linear."""
    if not is_plain(layer):
        out = layer(x)
        return out if residual is None else out + residual
    if residual is None or residual.shape[:-1] != x.shape[:-1]:  # a residual that broadcasts over the batch
        out = linear(x, layer.weight, layer.bias)
        return out if residual is None else out + residual
    return linear(x, layer.weight, layer.bias, residual=residual)
