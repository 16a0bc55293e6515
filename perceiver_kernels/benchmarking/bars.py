"""The bars this library holds itself to, each measured in one run and set against its limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from perceiver_kernels.benchmarking import compare, models, tables
from perceiver_kernels.benchmarking.cases import CASES
from perceiver_kernels.benchmarking.compare import Result
from perceiver_kernels.benchmarking.measure import Call, Timing, interleave
from perceiver_kernels.benchmarking.providers import PROVIDERS


@dataclasses.dataclass(frozen=True)
class Bar:
    """One figure and its limit.

    Args:
        what: the figure, in words.
        value: measured, or None with `note` saying why it could not be.
        limit: what it is held to.
        at_least: whether the limit is a floor rather than a ceiling.
        show: how a figure of this kind is written.
        note: what a reader should know besides.
    """

    what: str
    value: float | None
    limit: float
    at_least: bool
    show: Callable[[float], str] = dataclasses.field(default=tables.ratio, compare=False)
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the figure holds; None when it was not measured."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def percent(value: float) -> str:
    return f"{value:.0%}"


class Recorder:
    """Bars and the raw results they were computed from, gathered over one run."""

    def __init__(self, effort: compare.Effort, progress: compare.Progress) -> None:
        self.effort, self.progress = effort, progress
        self.results: list[Result] = []

    def compare(self, case: str, mode: str, *providers: str) -> dict[str, Result]:
        who = [PROVIDERS[name] for name in providers]
        results = compare.compare(CASES[case], mode, who, self.effort, self.progress)
        self.results += results
        return {result.provider: result for result in results}

    def compare_models(self, model: str, mode: str, *providers: str) -> dict[str, Result]:
        results = models.compare_models(models.MODELS[model], mode, providers, self.effort, self.progress)
        self.results += results
        return {result.provider: result for result in results}

    def interleave(self, calls: Mapping[str, Call], visit: float = 0.03) -> dict[str, Timing]:
        for call in calls.values():
            call()
        return interleave(calls, budget=self.effort.budget, min_rounds=self.effort.min_rounds, visit=visit)


Group = Callable[[Recorder], Iterator[Bar]]


def measured(groups: Iterable[Group], recorder: Recorder) -> Iterator[Bar]:
    """Every bar of the groups, in the order of the table, measured as it is asked for."""
    for group in groups:
        recorder.progress(group.__doc__.splitlines()[0].rstrip(".") if group.__doc__ else group.__name__)
        yield from group(recorder)


HEADER = ("what", "measured", "bar", "", "note")
VERDICTS = {True: "holds", False: "MISSED", None: "not measured"}


def row(bar: Bar) -> list[str]:
    """A bar's line of the table."""
    value = "-" if bar.value is None else bar.show(bar.value)
    return [bar.what, value, f"{'>=' if bar.at_least else '<='} {bar.show(bar.limit)}", VERDICTS[bar.passed], bar.note]


def record(bar: Bar) -> dict[str, Any]:
    """A bar as it is kept in a file."""
    kept = {name: getattr(bar, name) for name in ("what", "value", "limit", "at_least", "note")}
    return kept | {"verdict": VERDICTS[bar.passed]}
