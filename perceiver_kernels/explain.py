"""pk.explain: in words, what would run a call and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from perceiver_kernels.ops import (
    absorbed_attention,
    cross_attention,
    feed_forward,
    fourier_encode,
    latent_attention,
    linear,
    separable_attention,
    separable_query_attention,
)

_EXPLANATIONS: dict[str, Callable[..., str]] = {
    op.OP: op.explain
    for op in (
        absorbed_attention,
        cross_attention,
        feed_forward,
        fourier_encode,
        latent_attention,
        linear,
        separable_attention,
        separable_query_attention,
    )
}


def explain(op: Any, *args: Any, **kwargs: Any) -> str:
    """Which backend would run this call, and each other backend's reasons why not.

    Args:
        op: an op's function or name (pk.separable_attention or "separable_attention"), or a module of this library such
            as pk.CrossAttention or pk.Perceiver, which explains the path of each of its layers and its cost.
        args, kwargs: as the call would get them.

    Returns:
        Text of one or more lines.

    Raises:
        ValueError: nothing is known of such an op.
    """
    if hasattr(op, "explain"):
        return op.explain(*args, **kwargs)
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _EXPLANATIONS:
        raise ValueError(
            f"op is {name!r}, must be one of {', '.join(sorted(_EXPLANATIONS))} or a module of this library"
        )
    return _EXPLANATIONS[name](*args, **kwargs)
