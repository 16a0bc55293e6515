"""Which backend runs a call, and why: backends declare what they support, and the first that can run a call does."""

from __future__ import annotations

import contextvars
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

BACKENDS = ("cuda", "triton", "native", "reference")
CHOICES = ("auto", *BACKENDS)
ENVIRONMENT = "PERCEIVER_KERNELS_BACKEND"


class BackendError(RuntimeError):
    """A forced backend cannot run this call; the message lists every reason."""


@dataclass(frozen=True)
class Call:
    """What a backend needs to know of one call to decide whether it can run it."""

    op: str
    device: str
    compute_dtype: torch.dtype
    data_dtype: torch.dtype
    axes: int | None = None
    channels: int | None = None
    mask: bool = False
    dropout: bool = False
    head_dims: tuple[int, int] | None = None  # of q and k, of v


@dataclass(frozen=True)
class Declaration:
    """What one backend supports of one op. Selection, error messages, explain() and the test grid come from these."""

    op: str
    backend: str
    load: Callable[[], ModuleType]
    devices: tuple[str, ...]
    compute_dtypes: tuple[torch.dtype, ...]
    data_dtypes: tuple[torch.dtype, ...]
    axes: tuple[int, int] | None = None
    channels: tuple[int, int] | None = None
    # The head dimensions it is made for, of q, k and v alike; None: any.
    head_dims: tuple[int, ...] | None = None
    mask: bool = True
    dropout: bool = True
    deterministic: bool = True
    # Why it cannot be used here, and, asked of calls on a GPU alone, why not there.
    unavailable: Callable[[], str | None] = field(default=lambda: None)
    unusable: Callable[[Call], str | None] = field(default=lambda call: None)
    # Further devices, for calls of those who ask for this backend by name.
    devices_if_forced: Callable[[], tuple[str, ...]] = field(default=lambda: ())

    def not_supported_reasons(self, call: Call) -> list[str]:
        """Every reason why this backend cannot run the call; empty where it can."""
        reasons = []
        missing = self.unavailable() or (self.unusable(call) if call.device == "cuda" else None)
        if missing:
            reasons.append(missing)
        reason = self._device_reason(call.device)
        if reason:
            reasons.append(reason)
        if call.compute_dtype not in self.compute_dtypes:
            reasons.append(f"compute dtype is {_name(call.compute_dtype)}, must be {_one_of(self.compute_dtypes)}")
        if call.data_dtype not in self.data_dtypes:
            reasons.append(f"data dtype is {_name(call.data_dtype)}, must be {_one_of(self.data_dtypes)}")
        for what, value, limits in (("axes", call.axes, self.axes), ("channels", call.channels, self.channels)):
            if value is not None and limits is not None and not limits[0] <= value <= limits[1]:
                reasons.append(f"{what} is {value}, must be from {limits[0]} to {limits[1]}")
        if call.head_dims is not None and self.head_dims is not None:
            head_dim, head_dim_v = call.head_dims
            if head_dim not in self.head_dims:
                reasons.append(f"head_dim is {head_dim}, must be {_one_of(self.head_dims)}")
            if head_dim_v != head_dim:
                reasons.append(f"head_dim_v is {head_dim_v}, must be {head_dim} as head_dim is")
        if call.mask and not self.mask:
            reasons.append("a mask is given, which it does not take")
        if call.dropout and not self.dropout:
            reasons.append("dropout is on, which it does not do")
        return reasons

    def _device_reason(self, device: str) -> str | None:
        if "any" in self.devices or device in self.devices:
            return None
        if device not in self.devices_if_forced():
            return f"device is {device}, must be {_one_of(self.devices)}"
        if current_backend() == self.backend:
            return None
        return f"device is {device}, where it runs only if asked for by name"


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")


def _one_of(values: tuple[Any, ...]) -> str:
    return " or ".join(_name(value) for value in values)


_declarations: dict[str, list[Declaration]] = {}
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("perceiver_kernels_backend", default=None)


def declare(declaration: Declaration) -> None:
    """Adds a backend's declaration for an op; the order of BACKENDS is the order of preference."""
    entries = _declarations.setdefault(declaration.op, [])
    entries.append(declaration)
    entries.sort(key=lambda entry: BACKENDS.index(entry.backend))


def declarations(op: str | None = None) -> list[Declaration]:
    """All declarations, of one op or of every op, in order of preference."""
    if op is None:
        return [entry for entries in _declarations.values() for entry in entries]
    if op not in _declarations:
        raise ValueError(f"op is {op!r}, must be one of {', '.join(sorted(_declarations))}")
    return list(_declarations[op])


def current_backend() -> str:
    """The backend asked for: by use_backend(), else by PERCEIVER_KERNELS_BACKEND, else "auto"."""
    return _chosen.get() or _checked(os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT)


def _checked(name: str, argument: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{argument} is {name!r}, must be one of {', '.join(CHOICES)}")
    return name


class use_backend:  # noqa: N801  a function to its users, and a context manager
    """Makes every op run on one backend: from now on, or, in a `with` statement, until its end.

    The choice belongs to the calling thread (its context); PERCEIVER_KERNELS_BACKEND is the default of all threads.

    Args:
        name: "auto" (the first that supports the call), "reference", "native", "triton" or "cuda".

    Raises:
        ValueError: no such name. A backend that cannot run a call raises BackendError at that call.
    """

    def __init__(self, name: str) -> None:
        self._before = _chosen.set(_checked(name, "name"))

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        _chosen.reset(self._before)


def select(call: Call) -> Declaration:
    """The declaration that runs the call.

    Raises:
        BackendError: the forced backend cannot run it; the message lists every reason.
    """
    wanted = current_backend()
    for entry in _declarations[call.op]:
        if wanted in ("auto", entry.backend) and not entry.not_supported_reasons(call):
            return entry
    raise BackendError(f"{call.op} cannot run on the backend {wanted!r} that was asked for:\n{describe(call)}")


def describe(call: Call, instead: str | None = None) -> str:
    """Which backend would run the call, and every other backend's reasons why not.

    Args:
        call: what to run.
        instead: what runs it in the place of all backends, where something does.
    """
    wanted = current_backend()
    lines, chosen = ([], False) if instead is None else ([f"  {instead}: runs this call"], True)
    for entry in _declarations[call.op]:
        reasons = entry.not_supported_reasons(call)
        if wanted not in ("auto", entry.backend):
            reasons.append(f"the backend asked for is {wanted!r}")
        if reasons:
            lines.append(f"  {entry.backend}: no, {'; '.join(reasons)}")
        else:
            lines.append(f"  {entry.backend}: {'would do' if chosen else 'runs this call'}")
            chosen = True
    known = {entry.backend for entry in _declarations[call.op]}
    lines += [f"  {name}: no, it has no {call.op}" for name in BACKENDS if name not in known]
    return "\n".join([call.op, *lines])
