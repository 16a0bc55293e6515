"""A test module's checks once for each instruction set of the CPU extension, in a process that is forced to it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

LEVELS = ("generic", "avx2", "avx512")


def check_at(level: str, module: str, checks: str) -> None:
    """Run checks, lines of Python that know the test module as t, where `level` is what the extension runs.

    The seed is fixed, as it is for every test: one row's gradient may cancel so far that chance passes its tolerance.
    """
    _cpu = pytest.importorskip("perceiver_kernels._cpu")
    if level not in _cpu.isa_levels():
        pytest.skip(f"this processor does not run {level}")
    setup = (
        f"import torch, {module} as t\n"
        "from perceiver_kernels import _cpu\n"
        f"assert _cpu.isa() == {level!r}\n"
        "torch.manual_seed(0)\n"
    )
    path = os.pathsep.join((os.path.dirname(__file__), os.getcwd()))
    done = subprocess.run(
        [sys.executable, "-c", setup + textwrap.dedent(checks)],
        env={**os.environ, "PERCEIVER_KERNELS_CPU_ISA": level, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr}"
