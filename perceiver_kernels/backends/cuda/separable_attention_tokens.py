"""The other half of separable attention's backward in CUDA C++: csrc/cuda/separable_attention_tokens.cu."""

from __future__ import annotations

from torch import Tensor

from perceiver_kernels.backends.cuda import runtime
from perceiver_kernels.backends.native import describe, describe_all


def tokens_gradients(
    form: Tensor,
    x: Tensor,
    r: Tensor | None,
    mask: Tensor | None,
    dropout_p: float,
    seed: int,
    d_sums: Tensor,
    statistics: Tensor,
    d_x: Tensor,
    d_r: Tensor,
) -> None:
    """Fills d_x and d_r, the gradients of x and r; either is empty where it is not wanted.

    Args:
        form: (batch or 1, entries, rows), contiguous.
        d_sums: (batch, entries, rows), contiguous.
        statistics: (batch, 4, padded rows), contiguous, as the Triton backend's separable_attention_bwd_prepare_kernel
            leaves them.
    """
    call = (describe(form), describe(x), describe(r), describe(mask)), (dropout_p, seed, 0)
    needs = d_x.numel() > 0, d_r.numel() > 0
    floats = runtime.module().separable_attention_bwd_tokens_workspace(*call, *needs)
    workspace = form.new_empty(floats)
    results = [describe(result) if needed else None for result, needed in zip((d_x, d_r), needs, strict=True)]
    runtime.module().separable_attention_bwd_tokens(
        *call, *describe_all((workspace, d_sums, statistics)), *results, runtime.stream(x)
    )
