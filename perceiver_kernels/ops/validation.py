"""What ops share in checking and casting their arguments, before any kernel; every message names the argument."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

COMPUTE_DTYPES = (torch.float32, torch.float64)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Named = tuple[str, Tensor | None]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast casts to on a device, or None where it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype, where it is on and they are of lower precision than float64."""
    dtype = autocast_dtype(tensors[0].device)
    if dtype is None:
        return tensors
    return tuple(
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )


def check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}, must be float32, float64, bfloat16 or float16")


def check_computes(name: str, tensor: Tensor) -> None:
    """For the argument whose dtype is that of the computation."""
    if tensor.dtype not in COMPUTE_DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}, must be torch.float32 or torch.float64")


def check_rows(a: Tensor) -> None:
    """For the queries of attention in the tokens' own channels."""
    if a.dim() != 3:
        raise ValueError(f"a has {a.dim()} dimensions, must have 3: (batch or 1, rows, channels)")
    check_computes("a", a)


def check_dtypes(named: Iterable[Named], like: tuple[str, Tensor]) -> None:
    """All that are given have the dtype of another argument."""
    for name, tensor in named:
        if tensor is not None and tensor.dtype != like[1].dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, must be {like[1].dtype} as {like[0]} has")


def check_devices(named: Iterable[Named], like: tuple[str, Tensor]) -> None:
    """All that are given are on the device of another argument."""
    for name, tensor in named:
        if tensor is not None and tensor.device != like[1].device:
            raise ValueError(f"{name} is on {tensor.device}, must be on {like[1].device} as {like[0]} is")


def check_batch(name: str, tensor: Tensor, like: tuple[str, Tensor]) -> None:
    if tensor.shape[0] != like[1].shape[0]:
        raise ValueError(f"{name} has batch {tensor.shape[0]}, must be {like[1].shape[0]} as {like[0]} has")


def check_boolean(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}, must be torch.bool (True = attend)")


def check_key_mask(mask: Tensor | None, batch: int, keys: int, whose: str) -> None:
    """A mask (batch, keys), where one is given; whose, in the message: "keys of k"."""
    if mask is None:
        return
    check_boolean(mask)
    if tuple(mask.shape) != (batch, keys):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, must be {(batch, keys)}: batch and {whose}")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """For queries, keys and values (batch, heads, tokens, head_dim)."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has {tensor.dim()} dimensions, must have 4: (batch, heads, tokens, head_dim)")
        if tensor.shape[3] < 1:
            raise ValueError(f"{name} has head_dim 0, must have at least 1")
    check_floating("q", q)
    keys_and_values = (("k", k), ("v", v))
    check_dtypes(keys_and_values, ("q", q))
    check_devices(keys_and_values, ("q", q))
    for name, tensor in keys_and_values:
        check_batch(name, tensor, ("q", q))
        if tensor.shape[1] != q.shape[1]:
            raise ValueError(f"{name} has {tensor.shape[1]} heads, must have {q.shape[1]} as q has")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k has head_dim {k.shape[3]}, must have {q.shape[3]} as q has")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v has {v.shape[2]} tokens, must have {k.shape[2]} as k has")


def check_vector(name: str, vector: Tensor | None, size: int, reason: str) -> None:
    if vector is not None and tuple(vector.shape) != (size,):
        raise ValueError(f"{name} has shape {tuple(vector.shape)}, must be ({size},) as {reason}")


def check_parameters(x: Tensor, **parameters: Tensor | None) -> None:
    """All that are given are on x's device, and in its dtype; under autocast in any floating one."""
    if autocast_dtype(x.device) is None:
        check_dtypes(parameters.items(), ("x", x))
    else:
        for name, tensor in parameters.items():
            if tensor is not None:
                check_floating(name, tensor)
    check_devices(parameters.items(), ("x", x))
