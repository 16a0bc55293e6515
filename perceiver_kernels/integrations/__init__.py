"""pk.accelerate and pk.restore: Perceivers of other libraries made faster in place, and undone."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from perceiver_kernels.integrations.swap import (
    Left,
    Report,
    Swap,
    carry_out,
    original_class,
    set_class,
    swapped_modules,
)

# By the top-level package that a module's class is from; each has a function plan(model) -> list[Swap | Left] | None.
# They import that package, so they are imported only when a module of it is met.
INTEGRATIONS = {
    "transformers": "perceiver_kernels.integrations.transformers",
    "perceiver_pytorch": "perceiver_kernels.integrations.perceiver_pytorch",
    "perceiver": "perceiver_kernels.integrations.krasserm_perceiver_io",
    "flash_perceiver": "perceiver_kernels.integrations.flash_perceiver",
}
SUPPORTED = "transformers, perceiver-pytorch, perceiver-io (krasserm) or flash-perceiver"


def accelerate(model: nn.Module) -> Report:
    """Let this library's operators compute a Perceiver of another library, in place; `restore` undoes it.

    Results, gradients, parameters, state_dict and interface stay. What the operators do not cover, such as attention
    weights as an output, or layers that something else has wrapped, runs as before. Accelerating twice is the same as
    once, but takes note of what has changed in between.

    Args:
        model: a Perceiver of transformers, perceiver-pytorch, perceiver-io or flash-perceiver, or a model that holds
            some.

    Returns:
        What was swapped, and what was left and why; it prints as a table.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: there is no Perceiver in it that this library knows. After any error the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, must be a torch.nn.Module")
    before = [(module, type(module)) for module in swapped_modules(model)]
    try:
        return carry_out(_plan(restore(model)))
    except BaseException:
        for module, kind in before:
            set_class(module, kind)
        raise


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`, in place, and give the model; one that was not accelerated stays as it is.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, must be a torch.nn.Module")
    for module in swapped_modules(model):
        set_class(module, original_class(module))
    return model


def _plan(model: nn.Module) -> list[Swap | Left]:
    """What each integration concerned has planned, in the order of INTEGRATIONS."""
    packages = {type(module).__module__.partition(".")[0] for module in model.modules()}
    steps: list[Swap | Left] = []
    unlike = ""
    for package in (name for name in INTEGRATIONS if name in packages):
        try:
            integration = import_module(INTEGRATIONS[package])
        except ImportError as error:  # another package of this name, or another release
            unlike += f"; this {package} is none of those: {error}"
            continue
        steps += integration.plan(model) or []
    if steps:
        return steps
    kind = type(model)
    found = ", ".join(sorted({type(module).__name__ for module in model.modules()} - {kind.__name__})) or "nothing"
    raise ValueError(
        f"model is a {kind.__module__}.{kind.__name__} of {found}, must be or hold a Perceiver of {SUPPORTED}{unlike}"
    )


__all__ = ["Left", "Report", "Swap", "accelerate", "restore"]
