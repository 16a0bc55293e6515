"""Which tile sizes a kernel takes, and which of two ways a call: fixed by shape, or measured on request and remembered.

Nothing is timed unless PERCEIVER_KERNELS_AUTOTUNE=1. Choices are kept in the file that PERCEIVER_KERNELS_TILES names,
and are used from there whether or not autotuning is on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

AUTOTUNE = "PERCEIVER_KERNELS_AUTOTUNE"
FILE = "PERCEIVER_KERNELS_TILES"

# Measuring one choice may need others: the way that runs a kernel, the kernel's tiles.
_lock = threading.RLock()
_choices: dict[str, Any] = {}
_read: str | None = None


@dataclass(frozen=True)
class Tiles:
    """A launch's sizes: rows and columns of a program's tile, warps of a program, stages of its loads, and parts that
    the long dimension is split into."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2
    parts: int = 1


def choose(
    kernel: str,
    problem: Sequence[Any],
    default: Tiles,
    candidates: Sequence[Tiles] = (),
    run: Callable[[Tiles], Any] | None = None,
) -> Tiles:
    """The tiles for a kernel on a problem: what the file says, else the fastest candidate if asked for, else default.

    Args:
        kernel: its name.
        problem: what the choice depends on, besides the chip: sizes rounded up, dtypes, options.
        default: by shape and chip, never measured here.
        candidates: what autotuning compares with the default.
        run: launches the kernel with some tiles, on the call's own tensors and scratch results.
    """
    if not candidates:
        return default
    known = _chosen(kernel, problem, run and functools.partial(_fastest_tiles, [default, *candidates], run))
    return default if known is None else Tiles(**known)


def choose_by_name(
    what: str, problem: Sequence[Any], default: str, runs: Mapping[str, Callable[[], Any]] | None = None
) -> str:
    """One of several ways to compute the same: remembered or measured as tiles are, else default."""
    known = _chosen(what, problem, functools.partial(_fastest_way, runs) if runs else None)
    return default if known is None else known


def _chosen(what: str, problem: Sequence[Any], measure: Callable[[], Any] | None) -> Any | None:
    """What the file says, else what is measured now and remembered, if asked for."""
    if not (_on(AUTOTUNE) or os.environ.get(FILE)):
        return None
    key = "|".join([what, _chip(), *map(str, problem)])
    with _lock:
        known = _known().get(key)
        if known is None and measure is not None and _on(AUTOTUNE):
            known = measure()
            _remember(key, known)
    return known


def next_power_of_2(size: int, at_least: int = 1) -> int:
    return max(at_least, 1 << max(size - 1, 0).bit_length())


def _on(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


def _chip() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"


def _fastest_tiles(candidates: list[Tiles], run: Callable[[Tiles], Any]) -> dict[str, int]:
    from triton.runtime.errors import OutOfResources

    times = {}
    for tiles in candidates:
        try:
            times[tiles] = _time(functools.partial(run, tiles))
        except OutOfResources:
            continue
    return dataclasses.asdict(min(times, key=lambda tiles: times[tiles]) if times else candidates[0])


def _fastest_way(runs: Mapping[str, Callable[[], Any]]) -> str:
    return min(runs, key=lambda name: _time(runs[name]))


def _time(run: Callable[[], Any]) -> float:
    """Milliseconds, the median of some runs."""
    from triton.testing import do_bench

    return do_bench(run, warmup=5, rep=25, return_mode="median")


def _known() -> dict[str, Any]:
    """The choices so far, with those of the file once it has been read."""
    global _read
    name = os.environ.get(FILE)
    if name and name != _read:
        _read = name
        path = Path(name)
        if path.exists():
            _choices.update(json.loads(path.read_text(encoding="utf-8")))
    return _choices


def _remember(key: str, choice: Any) -> None:
    _choices[key] = choice
    name = os.environ.get(FILE)
    if name:
        temporary = Path(f"{name}.{os.getpid()}")
        temporary.write_text(json.dumps(_choices, indent=1, sort_keys=True), encoding="utf-8")
        temporary.replace(name)
