"""The README's support matrix, from the backends' declarations; `--write README.md` puts it there."""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from perceiver_kernels import dispatch, ops
from perceiver_kernels.benchmarking import tables
from perceiver_kernels.dispatch import Declaration

BEGIN, END = "<!-- support matrix -->", "<!-- /support matrix -->"

HEADER = ("op", "backend", "devices", "computes in", "reads data in", "axes", "data channels", "mask", "dropout")
NOT_AN_ARGUMENT = "-"


def markdown() -> str:
    """One row per op and backend, and under the table the backends that no op has yet."""
    for module in pkgutil.iter_modules(ops.__path__):
        importlib.import_module(f"{ops.__name__}.{module.name}")
    # By name, lest the order in which ops happen to be imported show; within an op by preference.
    declarations = sorted(dispatch.declarations(), key=lambda declaration: declaration.op)
    declared = {declaration.backend for declaration in declarations}
    missing = [f"`{name}`" for name in dispatch.BACKENDS if name not in declared]
    table = tables.markdown(HEADER, [row(declaration) for declaration in declarations])
    note = '"any" sets no limit beyond the op\'s own; "-": the op has no such argument.'
    return f"{table}\n\n{note}" + (f" Not yet built: {', '.join(missing)}." if missing else "")


def row(declaration: Declaration) -> list[str]:
    """One declaration's line of the table."""
    arguments = inspect.signature(public_function(declaration.op)).parameters
    return [
        f"`{declaration.op}`",
        declaration.backend,
        listed(declaration.devices),
        listed(declaration.compute_dtypes),
        listed(declaration.data_dtypes),
        limits(declaration.axes),
        listed(declaration.head_dims) if declaration.head_dims else limits(declaration.channels),
        answer(declaration.mask) if "mask" in arguments else NOT_AN_ARGUMENT,
        answer(declaration.dropout) if "dropout_p" in arguments else NOT_AN_ARGUMENT,
    ]


def public_function(op: str) -> Callable[..., Any]:
    """An op's function, which has the name of its file."""
    return getattr(importlib.import_module(f"{ops.__name__}.{op}"), op)


def listed(values: Sequence[object]) -> str:
    return ", ".join(str(value).removeprefix("torch.") for value in values)


def limits(bounds: tuple[int, int] | None) -> str:
    return "any" if bounds is None else f"{bounds[0]} to {bounds[1]}"


def answer(supported: bool) -> str:
    return "yes" if supported else "no"


def rewritten(text: str) -> str:
    """The text with what stands between the two markers replaced by the current matrix.

    Raises:
        ValueError: the markers are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"text has no block between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{markdown()}\n\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the matrix, or writes it into a file."""
    parser = argparse.ArgumentParser(prog="python -m perceiver_kernels.support_matrix", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="a Markdown file with the two markers")
    target = parser.parse_args(argv).write
    if target is None:
        print(markdown())
    else:
        target.write_text(rewritten(target.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
