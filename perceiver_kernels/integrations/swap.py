"""How modules of another library get faster in place: planned whole, swapped by class, undone by class.

A swapped module stays the same object with another class, one of ours that subclasses its own. Parameters, buffers,
hooks, state_dict, isinstance, deepcopy, pickle and DDP do not notice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn


class Accelerated:
    """Second base of every class of ours that stands in for a library's class, which is the first base.

    In this order an object of the one class can become one of the other: class Layer(theirs.Layer, Accelerated). Its
    forward computes by this library's operators what the original computes, from the module's own parameters, and
    calls super().forward for what they do not cover.
    """

    __slots__ = ()
    original: ClassVar[type[nn.Module]]

    def __init_subclass__(cls) -> None:
        cls.original = cls.__bases__[0]


@dataclass(frozen=True)
class Swap:
    """A module to be swapped, by its name in the model, and the class that it is to have."""

    name: str
    module: nn.Module
    to: type[nn.Module]


@dataclass(frozen=True)
class Left:
    """A module that stays as it is, and why."""

    name: str
    module: nn.Module
    why: str


@dataclass(frozen=True)
class Report:
    """What `accelerate` did: names of modules, with their original classes, and the reasons of those left alone."""

    swapped: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        rows = [(name, f"{kind}, accelerated") for name, kind in self.swapped.items()]
        rows += [(name, f"left: {why}") for name, why in self.left.items()]
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join(f"{name.ljust(width)}  {what}" for name, what in rows)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was swapped, or has."""
    kind = type(module)
    return kind.original if issubclass(kind, Accelerated) else kind


def swapped_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules within a model that are swapped."""
    return (module for module in model.modules() if isinstance(module, Accelerated))


def set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module another class; only that of the module itself or a related one fits."""
    module.__class__ = kind


def carry_out(plan: Sequence[Swap | Left]) -> Report:
    """Swap all that the plan swaps, or nothing: an error undoes what was swapped before it."""
    swaps = [step for step in plan if isinstance(step, Swap)]
    done: list[Swap] = []
    try:
        for swap in swaps:
            original = swap.to.original if issubclass(swap.to, Accelerated) else None
            if type(swap.module) is not original:
                raise TypeError(f"{swap.name} is a {type(swap.module).__name__}, which {swap.to.__name__} is not for")
            set_class(swap.module, swap.to)
            done.append(swap)
    except BaseException:
        for swap in done:
            set_class(swap.module, original_class(swap.module))
        raise
    return Report(
        {swap.name: original_class(swap.module).__name__ for swap in swaps},
        {step.name: step.why for step in plan if isinstance(step, Left)},
    )
