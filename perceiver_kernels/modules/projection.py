"""Linear layers inside this library's modules, run by its operators where nothing stands in the way."""

from typing import TypeGuard

from torch import Tensor, nn

from perceiver_kernels.ops.linear import linear


def is_stock(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this very class, not replaced (by an adapter, or quantised), and without hooks."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return type(module) is kind and not any(hooks) and "forward" not in vars(module)


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is an nn.Linear as it came."""
    return is_stock(layer, nn.Linear)


def project(layer: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """layer(x) + residual, the addition inside the operator where layer is a plain nn.Linear."""
    if not is_plain(layer):
        out = layer(x)
        return out if residual is None else out + residual
    if residual is None or residual.shape[:-1] != x.shape[:-1]:  # a residual that broadcasts over the batch
        out = linear(x, layer.weight, layer.bias)
        return out if residual is None else out + residual
    return linear(x, layer.weight, layer.bias, residual=residual)
