"""Dispatch as on a GPU, for tensors of the CPU: how whole models run on Triton's kernels in the interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from perceiver_kernels import dispatch
from perceiver_kernels.dispatch import Call, Declaration


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Every op runs on Triton where it has such a backend that takes the call, else on the reference.

    `use_backend("triton")` alone is an error for ops without one, of which a model has some.
    """
    chosen = dispatch.select
    dispatch.select = select
    try:
        with dispatch.use_backend("triton"):
            yield
    finally:
        dispatch.select = chosen


def select(call: Call) -> Declaration:
    """What `dispatch.select` would take on a GPU without CUDA kernels."""
    entries = [entry for entry in dispatch.declarations(call.op) if entry.backend in ("triton", "reference")]
    return next(entry for entry in entries if not entry.not_supported_reasons(call))
