"""A test module's checks in a process of their own, for what is chosen once per process: instruction sets, targets."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

INSTRUCTION_SETS = ("generic", "avx2", "avx512")


def run_checks(module: str, checks: str, **environment: str) -> None:
    """Run checks, lines of Python that know torch and the test module as t.

    The seed is fixed, as it is for every test: one row's gradient may cancel so far that chance passes its tolerance.
    """
    setup = f"import conftest, torch, {module} as t\ntorch.manual_seed(0)\n"
    path = os.pathsep.join((os.path.dirname(__file__), os.getcwd()))
    done = subprocess.run(
        [sys.executable, "-c", setup + textwrap.dedent(checks)],
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr}"


def check_at(level: str, module: str, checks: str) -> None:
    """Run checks where an instruction set is what the CPU extension runs."""
    _cpu = pytest.importorskip("perceiver_kernels._cpu")
    if level not in _cpu.isa_levels():
        pytest.skip(f"this processor does not run {level}")
    sure = f"from perceiver_kernels import _cpu\nassert _cpu.isa() == {level!r}\n"
    run_checks(module, sure + textwrap.dedent(checks), PERCEIVER_KERNELS_CPU_ISA=level)
