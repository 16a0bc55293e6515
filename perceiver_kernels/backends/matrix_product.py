"""x @ weight^T on a CPU by whichever way is fastest on this machine: torch's product or a packed one, measured once."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.backends.prepared_weights import PreparedWeights

ENVIRONMENT = "PERCEIVER_KERNELS_LINEAR"
NARROW = (torch.bfloat16, torch.float16)

# Below this many multiplications there is nothing to gain: torch's product, without a measurement.
SMALL = 1 << 22
# What a measurement may cost: it multiplies this many rows by as many columns as the second limit allows.
_MEASURED_ROWS = 256
_MEASURED_MULTIPLICATIONS = 1 << 26
_MEASURED_SECONDS = 0.025
# A packed weight is a second copy in memory, and a short measurement errs: the time must fall by this factor. With
# AVX-512 oneDNN's packed product took a third of the time of torch's; with AVX2 the two, and MKL's, were equal.
_WORTH_A_COPY = 0.75


@dataclass(frozen=True)
class Provider:
    """One way to multiply.

    Attributes:
        dtypes: of x that it takes.
        pack: the weight, for this many rows of x, in its own form; None where it needs none.
        multiply: x, the weight and its packed form to x @ weight^T.
        missing: why this torch or this processor has no such product of a dtype, or None.
    """

    dtypes: tuple[torch.dtype, ...]
    pack: Callable[[Tensor, int], Any] | None
    multiply: Callable[[Tensor, Tensor, Any], Tensor]
    missing: Callable[[torch.dtype], str | None] = lambda dtype: None

    def reason(self, dtype: torch.dtype) -> str | None:
        """Why it cannot multiply this dtype here, or None where it can."""
        if dtype not in self.dtypes:
            return f"multiplies {' and '.join(map(_name, self.dtypes))}, not {_name(dtype)}"
        return self.missing(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _onednn_missing(dtype: torch.dtype) -> str | None:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch was built without oneDNN"
    narrow = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if dtype in narrow and not narrow[dtype]():
        return f"oneDNN has no {_name(dtype)} products on this processor"
    return None


def _mkl_missing(dtype: torch.dtype) -> str | None:
    found = torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")
    return None if found else "this torch was built without MKL"


def _onednn_pack(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def _onednn_multiply(x: Tensor, weight: Tensor, packed: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _mkl_pack(weight: Tensor, rows: int) -> tuple[Tensor, int]:
    return torch.ops.mkl._mkl_reorder_linear_weight(weight, rows), rows


def _mkl_multiply(x: Tensor, weight: Tensor, packed: tuple[Tensor, int]) -> Tensor:
    return torch.ops.mkl._mkl_linear(x, packed[0], weight, None, packed[1])


def _widened_multiply(x: Tensor, weight: Tensor, packed: Tensor) -> Tensor:
    return torch.mm(x.float(), packed.t())


PROVIDERS = {
    "torch": Provider((torch.float32, torch.float64, *NARROW), None, lambda x, weight, _: torch.mm(x, weight.t())),
    "onednn": Provider((torch.float32, *NARROW), _onednn_pack, _onednn_multiply, _onednn_missing),
    "mkl": Provider((torch.float32,), _mkl_pack, _mkl_multiply, _mkl_missing),
    # Operands converted to float32, and the product left in it: processors without 16-bit products emulate them slowly.
    "widened": Provider(NARROW, lambda weight, _: weight.float(), _widened_multiply),
}
CHOICES = ("auto", *PROVIDERS)


@dataclass(frozen=True)
class Timing:
    """Seconds of one product, and of packing its weight."""

    multiply: float
    pack: float


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """For code that chooses its dtypes itself: torch's operators within it leave them as they are."""
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else contextlib.nullcontext()


prepared = PreparedWeights()
_timings: dict[tuple[Any, ...], dict[str, Timing]] = {}


def forced() -> str | None:
    """The provider that PERCEIVER_KERNELS_LINEAR asks for, or None for "auto".

    Raises:
        ValueError: no such provider.
    """
    choice = os.environ.get(ENVIRONMENT) or "auto"
    if choice not in CHOICES:
        raise ValueError(f"{ENVIRONMENT} is {choice!r}, must be one of {', '.join(CHOICES)}")
    return None if choice == "auto" else choice


def checked_forced(dtype: torch.dtype) -> str | None:
    """The forced provider, which can multiply this dtype.

    Raises:
        RuntimeError: it cannot.
    """
    name = forced()
    reason = None if name is None else PROVIDERS[name].reason(dtype)
    if reason:
        raise RuntimeError(f"{ENVIRONMENT} is {name!r}, which cannot be used: {reason}")
    return name


def has_narrow_products(dtype: torch.dtype) -> bool:
    """Whether the processor multiplies this 16-bit dtype in hardware, as far as torch can tell."""
    return _NARROW_PRODUCTS[dtype]


_NARROW_PRODUCTS = {
    torch.bfloat16: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
    torch.float16: getattr(torch.cpu, "_is_amx_fp16_supported", lambda: False)(),
}


def compute_dtype(x: Tensor, weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype to multiply in for a result in dtype: float32 in place of a 16-bit dtype where that is faster."""
    compiling = torch.compiler.is_compiling()  # nothing is measured then
    name = None if compiling else checked_forced(dtype)
    if dtype not in NARROW:
        return dtype
    if name is not None:
        return torch.float32 if name == "widened" else dtype
    if compiling or is_small(x.shape[0], weight):
        return dtype if has_narrow_products(dtype) else torch.float32
    timings = _timings_of(x, weight, dtype)
    return torch.float32 if fastest(timings) == "widened" else dtype


def is_small(rows: int, weight: Tensor) -> bool:
    return rows * weight.numel() < SMALL


def too_small(rows: int, weight: Tensor) -> bool:
    """Whether a call has less to gain than an operator of its own costs; never where a product is forced."""
    return is_small(rows, weight) and forced() is None


def prefers_torch(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's own product of x with a weight of its dtype is the one to take."""
    name = forced()
    if name is None and not is_small(x.shape[0], weight):
        name = fastest(_timings_of(x, weight, x.dtype))
    return name in (None, "torch")


def product(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x @ weight^T, (rows, N) in x's dtype; in `out` only where the chosen way can write there.

    Args:
        x: (rows, K) in the dtype to multiply in.
        weight: (N, K), of any floating dtype: the tensor that the caller keeps, so that forms made of it are found
            again.
        out: (rows, N), contiguous rows.
    """
    name = forced()
    if name == "widened" or (name is None and is_small(x.shape[0], weight)):
        name = "torch"
    own = _converted(weight, x.dtype)
    timings = {} if name else _timings_of(x, own, x.dtype)
    name = name or fastest(timings)
    provider = PROVIDERS[name]
    if provider.pack is not None:
        rows, at_once = x.shape[0], not timings or _pays_at_once(timings, name)
        packed = prepared.get(weight, f"{name} {_name(x.dtype)}", lambda: provider.pack(own, rows), at_once=at_once)  # type: ignore[misc]
        if packed is not None:
            return provider.multiply(x, own, packed)
    return torch.mm(x, own.t()) if out is None else torch.mm(x, own.t(), out=out)


def _converted(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.dtype == dtype:
        return weight
    converted = prepared.get(weight, _name(dtype), lambda: weight.detach().to(dtype))
    return weight.to(dtype) if converted is None else converted


def fastest(timings: dict[str, Timing]) -> str:
    """The fastest with packed weights; torch unless another is worth the memory of a copy."""
    name = min(timings, key=lambda name: timings[name].multiply)
    return name if timings[name].multiply < _WORTH_A_COPY * timings["torch"].multiply else "torch"


def _pays_at_once(timings: dict[str, Timing], name: str) -> bool:
    """Whether packing pays for a single use, as in training, where the next step changes the weight."""
    return timings[name].multiply + timings[name].pack < _WORTH_A_COPY * timings["torch"].multiply


def _timings_of(x: Tensor, weight: Tensor, dtype: torch.dtype) -> dict[str, Timing]:
    key = (dtype, x.shape[0].bit_length(), *weight.shape, torch.get_num_threads())
    if key not in _timings:
        with without_autocast("cpu"), torch.no_grad():
            _timings[key] = measure(x.shape[0], weight.shape[0], weight.shape[1], dtype)
    return _timings[key]


def measure(rows: int, out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, Timing]:
    """Seconds of every provider that can multiply the dtype here, on a part of the product, scaled to all of it."""
    usable = [name for name, provider in PROVIDERS.items() if not provider.reason(dtype)]
    if usable == ["torch"]:
        return {"torch": Timing(0.0, 0.0)}
    some = min(rows, _MEASURED_ROWS)
    columns = max(1, min(out_features, _MEASURED_MULTIPLICATIONS // (some * in_features)))
    x, weight = torch.ones(some, in_features, dtype=dtype), torch.ones(columns, in_features, dtype=dtype)
    whole = (out_features / columns) * (rows / some)
    deadline = time.perf_counter() + _MEASURED_SECONDS
    packed, packing, seconds = {}, {}, dict.fromkeys(usable, math.inf)
    for turn in range(4):
        for name in list(usable):
            provider = PROVIDERS[name]
            try:
                if turn == 0:
                    start = time.perf_counter()
                    packed[name] = None if provider.pack is None else provider.pack(weight, some)
                    packing[name] = time.perf_counter() - start
                start = time.perf_counter()
                provider.multiply(x, weight, packed[name])
                seconds[name] = min(seconds[name], time.perf_counter() - start)
            except RuntimeError:  # a processor that a packed product does not take
                usable.remove(name)
                del seconds[name]
        if turn and time.perf_counter() > deadline:
            break
    scale = out_features / columns
    return {name: Timing(seconds[name] * whole, packing[name] * scale) for name in seconds}
