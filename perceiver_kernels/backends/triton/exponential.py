"""Powers of two in kernels: scores are in powers of two, log2(e) being folded into what they are made of."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def exp2(x, COMPILED: tl.constexpr):
    """2^x; COMPILED, that is, not in the interpreter: in one instruction instead of five, subnormal results being 0."""
    if COMPILED:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)
