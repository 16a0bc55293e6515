"""flash-perceiver by this library's operators: on CPUs and in float32 too, and without flash-attn installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType

from torch import nn

from perceiver_kernels.integrations.swap import Left, Swap

# What flash_perceiver imports, by module of flash_attn.
_STAND_INS = {
    "flash_attn": (),
    "flash_attn.bert_padding": ("pad_input", "unpad_input"),
    "flash_attn.modules": (),
    "flash_attn.modules.mha": ("MHA", "ParallelMHA"),
    "flash_attn.modules.block": ("Block",),
    "flash_attn.modules.mlp": ("Mlp", "GatedMlp"),
}


@contextmanager
def without_flash_attn() -> Iterator[None]:
    """Makes `import flash_perceiver` possible where flash-attn is not installed; where it is, nothing changes.

        with without_flash_attn():
            import flash_perceiver

    Its models then are made of modules of this library (flash_attn_stand_ins.py) with the parameters and the results of
    flash-attn's, on any device and in any dtype. When the block ends, no other library finds them in flash-attn's
    place.
    """
    if importlib.util.find_spec("flash_attn") is not None:
        yield
        return
    from perceiver_kernels.integrations import flash_attn_stand_ins

    modules = {name: ModuleType(name) for name in _STAND_INS}
    for name, contents in _STAND_INS.items():
        vars(modules[name]).update({each: getattr(flash_attn_stand_ins, each) for each in contents})
        modules[name].__spec__ = ModuleSpec(name, None)  # others ask for it to see what is installed
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def plan(model: nn.Module) -> list[Swap | Left] | None:
    """What of flash-perceiver there is in a model, and what becomes of it; None: nothing."""
    # They subclass flash_perceiver's classes, which cannot be imported before `without_flash_attn`.
    from perceiver_kernels.integrations import flash_perceiver_blocks as blocks

    steps = [step for name, module in model.named_modules() if (step := blocks.plan_module(name, module)) is not None]
    return steps or None
