"""The one marshaller from tensors to the compiled modules: torch tensors become (address, dtype, sizes, strides)."""

from __future__ import annotations

import importlib
import math
import mmap
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from perceiver_kernels.backends.layout import rows_first
from perceiver_kernels.backends.masked_keys import without_masked_keys, zero_masked_keys

# The codes of pk::DType in csrc/tensor.h.
DTYPE_CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.uint8: 4,
    torch.bool: 5,
}

HUGE_PAGES_FROM = 1 << 22  # bytes

Described: TypeAlias = tuple[int, int, tuple[int, ...], tuple[int, ...]]


@lru_cache(maxsize=1)
def cpu_module() -> ModuleType:
    """The compiled CPU module. Raises ImportError where this install has none."""
    return importlib.import_module("perceiver_kernels._cpu")


@lru_cache(maxsize=1)
def cpu_unavailable() -> str | None:
    """Why the compiled CPU module cannot be used, or None where it can."""
    try:
        cpu_module()
    except ImportError as error:
        return f"the compiled CPU module does not load: {error}"
    return None


def describe(tensor: Tensor | None) -> Described | None:
    """What native code needs to know of a tensor; the caller keeps the tensor alive during the call."""
    if tensor is None:
        return None
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tuple(tensor.shape), tensor.stride()


def describe_all(tensors: Sequence[Tensor | None]) -> tuple[Described | None, ...]:
    return tuple(describe(tensor) for tensor in tensors)


State: TypeAlias = tuple[Tensor, Tensor, Tensor]


def _parts(form: Tensor | None, x: Tensor) -> tuple[Described | None, tuple[Described, ...]]:
    """The data channels' part of a form (batch, entries, rows) and every axis's, each as (batch, rows, its entries)."""
    if form is None:
        return None, ()
    batch, _, rows = form.shape
    batch_stride, entry_stride, row_stride = form.stride()
    address, parts = form.data_ptr(), []
    for size in (x.shape[-1], *x.shape[1:-1]):
        strides = (batch_stride, row_stride, entry_stride)
        parts.append((address, DTYPE_CODES[form.dtype], (batch, rows, size), strides))
        address += size * entry_stride * form.element_size()
    return parts[0], tuple(parts[1:])


def _inputs(form: Tensor, x: Tensor, r: Tensor | None, mask: Tensor | None) -> tuple[Any, ...]:
    return *_parts(form, x), describe(x), describe(r), describe(mask)


def _state(state: State, x: Tensor) -> tuple[Any, ...]:
    sums, lse, total = state
    return *_parts(sums, x), describe(lse), describe(total)


def separable_attention_fwd(
    form: Tensor, x: Tensor, r: Tensor | None, mask: Tensor | None, dropout_p: float, seed: int
) -> State:
    """sums, lse (float64) and total of separable attention, by csrc/cpu/separable_attention.cpp."""
    batch, (_, entries, rows) = x.shape[0], form.shape
    sums = form.new_empty(batch, entries, rows)
    lse = form.new_empty(batch, rows, dtype=torch.float64)
    total = form.new_empty(batch, rows)
    cpu_module().separable_attention_fwd(
        _inputs(form, x, r, mask), (dropout_p, seed, 0), _state((sums, lse, total), x), torch.get_num_threads()
    )
    return sums, lse, total


def separable_attention_bwd(
    form: Tensor,
    x: Tensor,
    r: Tensor | None,
    mask: Tensor | None,
    dropout_p: float,
    seed: int,
    saved: State,
    upstream: State,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the form, x and r, empty where not needed; rows and tokens by a kernel each."""
    needs_form, needs_x, needs_r = needs
    batch, (_, entries, rows) = x.shape[0], form.shape
    d_form = form.new_empty((batch, entries, rows) if needs_form else 0)
    # Masked tokens are never visited: their gradients are the zeros of the allocation.
    d_x = (x.new_empty if mask is None else x.new_zeros)(x.shape if needs_x else 0)
    d_r = (form.new_empty if mask is None else form.new_zeros)(x.shape[:-1] if needs_r else 0)
    cpu_module().separable_attention_bwd(
        _inputs(form, x, r, mask),
        (dropout_p, seed, 0),
        _state(saved, x),
        _state(upstream, x),
        (
            *_parts(d_form if needs_form else None, x),
            describe(d_x) if needs_x else None,
            describe(d_r) if needs_r else None,
        ),
        torch.get_num_threads(),
    )
    if needs_form and form.shape[0] == 1 and batch != 1:
        d_form = d_form.sum(0, keepdim=True)
    return d_form, d_x, d_r


def separable_layer_norm_fwd(
    x: Tensor,
    sums: Sequence[Tensor],
    squares: Sequence[Tensor],
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    feature_channels: int,
    eps: float,
) -> Tensor:
    """(batch, S_1, ..., S_A): LayerNorm's reciprocal standard deviation, by csrc/cpu/separable_layer_norm.cpp."""
    r = sums[0].new_empty(x.shape[:-1])
    # Kept in variables: the described memory must outlive the call.
    sums, squares = [s.contiguous() for s in sums], [s.contiguous() for s in squares]
    cpu_module().separable_layer_norm(
        describe(x), describe_all(sums), describe_all(squares), describe(x_scale), describe(x_shift),
        feature_channels, eps, describe(r), torch.get_num_threads(),
    )  # fmt: skip
    return r


def fourier_encode_grid(tables: Sequence[Tensor], sections: Sequence[int], data: Tensor | None, out: Tensor) -> None:
    """Fills out with [data | features], by csrc/cpu/fourier_encode.cpp."""
    tables = [table.contiguous() for table in tables]
    cpu_module().fourier_encode_grid(
        describe_all(tables), sections, describe(data), describe(out), torch.get_num_threads()
    )


def fourier_encode_points(
    positions: Tensor, frequencies: Sequence[float], grouped: bool, concat_pos: bool, sine_only: bool, out: Tensor
) -> None:
    """Fills out with the features of positions, by csrc/cpu/fourier_encode.cpp."""
    cpu_module().fourier_encode_points(
        describe(positions), frequencies, grouped, concat_pos, sine_only, describe(out), torch.get_num_threads()
    )


def latent_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """out (batch, heads, N, head_dim_v) and lse (batch, heads, N), by csrc/cpu/latent_attention.cpp."""
    out = rows_first(q, q.shape[2], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    cpu_module().latent_attention_fwd(
        describe_all((q, k, v)), scale, (dropout_p, seed, 0), describe_all((out, lse)), torch.get_num_threads()
    )
    return out, lse


def latent_attention_bwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, scale: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in memory as (batch, rows, heads, channels), by csrc/cpu/latent_attention.cpp."""
    d_q, d_k, d_v = (rows_first(tensor, *tensor.shape[2:]) for tensor in (q, k, v))
    lse = lse.contiguous()
    cpu_module().latent_attention_bwd(
        describe_all((q, k, v)),
        scale,
        (dropout_p, seed, 0),
        describe_all((out, lse)),
        describe(d_out),
        describe_all((d_q, d_k, d_v)),
        torch.get_num_threads(),
    )
    return d_q, d_k, d_v


def cross_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """out (batch, heads, queries, head_dim_v) and lse (batch, heads, queries), by csrc/cpu/cross_attention.cpp."""
    out = rows_first(q, q.shape[2], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    cpu_module().cross_attention_fwd(
        describe_all((q, k, v, mask)), scale, (dropout_p, seed, 0), describe_all((out, lse)), torch.get_num_threads()
    )
    return out, lse


def cross_attention_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    scale: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in memory as (batch, rows, heads, channels), by csrc/cpu/cross_attention.cpp."""
    d_q, d_k, d_v = (rows_first(tensor, *tensor.shape[2:]) for tensor in (q, k, v))
    if mask is not None:  # masked keys are never visited
        d_k.zero_()
        d_v.zero_()
    lse = lse.contiguous()
    cpu_module().cross_attention_bwd(
        describe_all((q, k, v, mask)),
        scale,
        (dropout_p, seed, 0),
        describe_all((out, lse)),
        describe(d_out),
        describe_all((d_q, d_k, d_v)),
        torch.get_num_threads(),
    )
    return d_q, d_k, d_v


Features: TypeAlias = tuple[Sequence[float], bool, bool, bool]  # frequencies, grouped, concat_pos, sine_only


def _with_sums(rows: Tensor, eps: float | None) -> Tensor:
    """With LayerNorm a token's mean is a further channel, whose form is the sum of the others."""
    return rows if eps is None else torch.cat((rows, rows.sum(2, keepdim=True)), 2)


def _without_sums(rows: Tensor, eps: float | None) -> Tensor:
    """What _with_sums does, transposed."""
    return rows if eps is None else rows[..., :-1] + rows[..., -1:]


def _absorbed_inputs(
    a: Tensor, x: Tensor | None, positions: Tensor | None, mask: Tensor | None, batch: int
) -> tuple[Described | None, ...]:
    shared = [None if tensor is None else tensor.expand(batch, -1, -1) for tensor in (a, x, positions)]
    return describe_all((*shared, mask))


def absorbed_attention_fwd(
    a: Tensor,
    x: Tensor | None,
    positions: Tensor | None,
    features: Features,
    mask: Tensor | None,
    eps: float | None,
    dropout_p: float,
    seed: int,
) -> State:
    """acc (batch, rows, C), lse (batch, rows), float64, and total, by csrc/cpu/absorbed_attention.cpp."""
    given = (x,) if x is not None else (a, positions, mask)
    batch = next((tensor.shape[0] for tensor in given if tensor is not None and tensor.shape[0] != 1), 1)
    a = _with_sums(a, eps)
    acc = a.new_empty(batch, *a.shape[1:])
    lse = a.new_empty(batch, a.shape[1], dtype=torch.float64)
    total = a.new_empty(batch, a.shape[1])
    cpu_module().absorbed_attention_fwd(
        _absorbed_inputs(a, x, positions, mask, batch), features, eps, (dropout_p, seed, 0),
        describe_all((acc, lse, total)), torch.get_num_threads(),
    )  # fmt: skip
    return _without_sums(acc, eps), lse, total


def absorbed_attention_bwd(
    a: Tensor,
    x: Tensor | None,
    positions: Tensor | None,
    features: Features,
    mask: Tensor | None,
    eps: float | None,
    dropout_p: float,
    seed: int,
    saved: State,
    upstream: State,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of a and x, empty where not needed, by csrc/cpu/absorbed_attention.cpp."""
    needs_a, needs_x = needs
    batch = saved[0].shape[0]
    a, d_acc = _with_sums(a, eps), _with_sums(upstream[0], eps)
    d_a = a.new_empty((batch, *a.shape[1:]) if needs_a else 0)
    # Masked tokens are never visited: their gradients are the zeros of the allocation.
    d_x = a.new_empty(0) if x is None or not needs_x else (x.new_empty if mask is None else x.new_zeros)(x.shape)
    cpu_module().absorbed_attention_bwd(
        _absorbed_inputs(a, x, positions, mask, batch), features, eps, (dropout_p, seed, 0),
        describe_all(saved), describe_all((d_acc, *upstream[1:])), describe(d_a) if needs_a else None,
        describe(d_x) if x is not None and needs_x else None, torch.get_num_threads(),
    )  # fmt: skip
    if needs_a:
        d_a = _without_sums(d_a, eps)
        d_a = d_a.sum(0, keepdim=True) if a.shape[0] == 1 and batch != 1 else d_a
    return d_a, d_x


def separable_query_attention_fwd(
    form: Tensor,
    v: Tensor,
    h: Tensor | None,
    x: Tensor | None,
    r: Tensor | None,
    mask: Tensor | None,
    grid: Sequence[int],
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """out (batch, heads, M, head_dim_v) in v's dtype, lse, by csrc/cpu/separable_query_attention.cpp."""
    batch, heads, _, head_dim = v.shape
    form, values, bias = without_masked_keys(form, _computable(v, form), h, mask)
    out = empty_large(values, (batch, math.prod(grid), heads, head_dim), values.dtype).transpose(1, 2)
    lse = form.new_empty(batch, heads, math.prod(grid))
    cpu_module().separable_query_attention_fwd(
        describe_all((form, values, bias, x, r)),
        list(grid),
        (dropout_p, seed, 0),
        describe_all((out, lse)),
        torch.get_num_threads(),
    )
    return out.to(v.dtype), lse


def separable_query_attention_bwd(
    form: Tensor,
    v: Tensor,
    h: Tensor | None,
    x: Tensor | None,
    r: Tensor | None,
    mask: Tensor | None,
    grid: Sequence[int],
    dropout_p: float,
    seed: int,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the form, v, h, x and r, empty where not needed.

    By csrc/cpu/separable_query_attention_backward.cpp.
    """
    batch = v.shape[0]
    shared = form, h, x, r
    form, values, bias = without_masked_keys(form, _computable(v, form), h, mask)
    out, d_out = _computable(out, form), _computable(d_out, form)
    lse = lse.contiguous()
    needs_form, needs_v, *needs_others = needs
    results = (
        form.new_empty(batch, *form.shape[1:]) if needs_form else None,
        torch.empty_like(values, memory_format=torch.contiguous_format) if needs_v else None,
        *(
            form.new_empty(batch, *tensor.shape[1:]) if needed and tensor is not None else None
            for tensor, needed in zip((h, x, r), needs_others, strict=True)
        ),
    )
    cpu_module().separable_query_attention_bwd(
        describe_all((form, values, bias, x, r)),
        list(grid),
        (dropout_p, seed, 0),
        describe_all((out, lse)),
        describe(d_out),
        describe_all(results),
        torch.get_num_threads(),
    )
    d_form, d_v, *others = results
    for gradient, keys in ((d_form, 3), (d_v, 2), (others[0], 2)):
        if gradient is not None:
            zero_masked_keys(gradient, mask, keys)
    d_form, d_h, d_x, d_r = (
        form.new_empty(0) if gradient is None or tensor is None else gradient.sum_to_size(tensor.shape)
        for gradient, tensor in zip((d_form, *others), shared, strict=True)
    )
    return d_form, v.new_empty(0) if d_v is None else d_v.to(v.dtype), d_h, d_x, d_r


def _computable(tensor: Tensor, form: Tensor) -> Tensor:
    """Kernels that compute in float64 take nothing else."""
    return tensor.to(form.dtype) if form.dtype == torch.float64 else tensor


def empty_large(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for a result, in huge pages where it is large: page faults cost more than filling it."""
    result = like.new_empty(shape, dtype=dtype)
    size = result.numel() * result.element_size()
    if size >= HUGE_PAGES_FROM:
        cpu_module().prefer_huge_pages(result.data_ptr(), size)
    return result


def empty_mapped(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for saved products and gradients: a mapping of its own, returned to the system when freed.

    Backward frees saved products one by one and wants memory for gradients, which the holes that they leave in the heap
    mostly do not fit: the heap would stay as large as it was, and the gradients come on top.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE_PAGES_FROM or not hasattr(mmap, "MAP_PRIVATE"):
        return like.new_empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    result = torch.frombuffer(memory, dtype=dtype).view(*shape)
    cpu_module().prefer_huge_pages(result.data_ptr(), size)
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # set by assignment
    if fills and torch.are_deterministic_algorithms_enabled():
        result.fill_(torch.nan)
    return result


# (code of pk::Activation in csrc/ops.h, gated)
ACTIVATION_CODES = {
    "none": (0, False),
    "gelu": (1, False),
    "gelu_tanh": (2, False),
    "geglu": (1, True),
    "geglu_tanh": (2, True),
}


def linear_epilogue_fwd(
    product: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, out: Tensor
) -> None:
    """Fills out with f(product + bias) + residual, by csrc/cpu/linear.cpp; out may be the product.

    All are (rows, channels) with contiguous channels; bias is float64 for a float64 product, else float32.
    """
    cpu_module().linear_epilogue_fwd(
        describe(bias), *ACTIVATION_CODES[activation], describe(product), describe(residual), describe(out),
        torch.get_num_threads(),
    )  # fmt: skip


def linear_epilogue_bwd(
    product: Tensor, bias: Tensor | None, d_out: Tensor, activation: str, d_product: Tensor, d_bias: Tensor | None
) -> None:
    """Fills d_product with the gradient of the product, and d_bias, where given, with its column sums."""
    cpu_module().linear_epilogue_bwd(
        describe(bias), *ACTIVATION_CODES[activation], describe(product), describe(d_out), describe(d_product),
        describe(d_bias), torch.get_num_threads(),
    )  # fmt: skip
