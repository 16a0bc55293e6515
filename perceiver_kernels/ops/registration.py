"""How every op enters torch: a pair of registered operators, forward and backward, and the autograd rule between them.

Registered so, torch.compile(fullgraph=True), export and autocast see an op as one call.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels import dispatch

library = torch.library.Library("perceiver_kernels", "FRAGMENT")


def define(schema: str) -> None:
    """Names an operator `perceiver_kernels::<name>` and its arguments."""
    library.define(schema)


def implement(name: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Gives a defined operator its code, and what its results are like for tensors without data.

    The code runs on its tensors' device, and chooses its dtypes itself: autocast is off.
    """

    @functools.wraps(implementation)
    def run(*arguments: Any) -> Any:
        tensor = _first_tensor(arguments)
        with _without_autocast(tensor.device.type), torch.cuda.device_of(tensor) if tensor.is_cuda else _AS_IT_IS:
            return implementation(*arguments)

    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"perceiver_kernels::{name}", fake, lib=library)


_AS_IT_IS = contextlib.nullcontext()


def _first_tensor(arguments: Sequence[Any]) -> Tensor:
    """Of an operator's arguments, which may begin with a list of tensors."""
    first = arguments[0]
    return first if isinstance(first, Tensor) else first[0]


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _AS_IT_IS


def differentiate(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Gives an operator its autograd rule; backward runs on the backend that was asked for in forward.

    Autograd runs backward in threads of its own, where the choice of the calling thread is not known.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend = dispatch.current_backend()
        setup_context(ctx, inputs, output)

    def run(ctx: Any, *gradients: Any) -> Any:
        with dispatch.use_backend(ctx.backend):
            return backward(ctx, *gradients)

    torch.library.register_autograd(f"perceiver_kernels::{name}", run, setup_context=setup, lib=library)


def register_pair(
    op: str,
    implementations: tuple[Callable[..., Any], Callable[..., Any]],
    fakes: tuple[Callable[..., Any], Callable[..., Any]],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    instead: str = "the formula in plain PyTorch",
) -> None:
    """Implements <op>_fwd and <op>_bwd, defined before: backward is the rule of the first, the second has none.

    Args:
        op: its name.
        implementations: of forward and of backward.
        fakes: the same.
        setup_context, backward: as torch.library.register_autograd takes them.
        instead: what to use where second derivatives are wanted.
    """

    def no_second_derivatives(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{op} has no second derivatives; use {instead} for those")

    for name, implementation, fake in zip((f"{op}_fwd", f"{op}_bwd"), implementations, fakes, strict=True):
        implement(name, implementation, fake)
    differentiate(f"{op}_fwd", setup_context, backward)
    torch.library.register_autograd(f"perceiver_kernels::{op}_bwd", no_second_derivatives, lib=library)
