"""setup.py and the CUDA compiler: left out, insisted on, broken, and for other GPUs; compilers are scripts here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Records its arguments and writes what it was asked for.
COMPILER = """#!/bin/sh
echo "$@" >> "$0.log"
while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""
BROKEN = """#!/bin/sh
echo "nvcc fatal: this is no compiler" >&2
exit 1
"""


class Tree:
    """A source tree with nothing in its files, and a CUDA_HOME."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "cuda"
        setup = (ROOT / "setup.py").read_text()
        names = [f"csrc/cpu/{name}.cpp" for name in ("levels", "parallel", *re.findall(r'^    "(\w+)",$', setup, re.M))]
        for name in (*names, "csrc/bindings.cpp", "csrc/cuda/bindings.cpp", "csrc/cuda/one.cu", "cuda/bin/"):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(exist_ok=True) if name.endswith("/") else path.touch()
        (folder / "perceiver_kernels").mkdir()
        (folder / "setup.py").write_text(setup)
        self.script(folder / "c++", COMPILER)

    def script(self, path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def nvcc(self, text: str) -> None:
        self.script(self.home / "bin" / "nvcc", text)

    def build(self, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PERCEIVER_KERNELS")}
        environment = {**kept, "CUDA_HOME": str(self.home), "CXX": str(self.folder / "c++"), **variables}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=60
        )

    def built(self) -> set[str]:
        return {path.name.partition(".")[0] for path in (self.folder / "perceiver_kernels").iterdir()}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def lines_about(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in (done.stdout + done.stderr).splitlines() if "perceiver_kernels:" in line]


def test_without_nvcc_a_line_says_so(tree: Tree) -> None:
    done = tree.build()
    assert done.returncode == 0 and tree.built() == {"_cpu"}
    message = "perceiver_kernels: CUDA kernels left out, there is no nvcc in CUDA_HOME/bin or on the PATH"
    assert lines_about(done) == [message]
    done = tree.build(PERCEIVER_KERNELS_CUDA="1")
    assert done.returncode != 0 and "PERCEIVER_KERNELS_CUDA is 1, but there is no nvcc" in done.stderr


def test_switched_off_nothing_is_said(tree: Tree) -> None:
    tree.nvcc(COMPILER)
    done = tree.build(PERCEIVER_KERNELS_CUDA="0")
    assert done.returncode == 0 and tree.built() == {"_cpu"} and not lines_about(done)
    assert not (tree.home / "bin" / "nvcc.log").exists()


def test_a_broken_nvcc_costs_the_kernels_or_the_build(tree: Tree) -> None:
    tree.nvcc(BROKEN)
    done = tree.build()
    assert done.returncode == 0 and tree.built() == {"_cpu"}
    (line,) = lines_about(done)
    assert "CUDA kernels left out, nvcc failed; PERCEIVER_KERNELS_CUDA=1 insists on them" in line
    done = tree.build(PERCEIVER_KERNELS_CUDA="1")
    assert done.returncode != 0 and "nvcc fatal: this is no compiler" in done.stdout + done.stderr
    assert "building perceiver_kernels._cuda failed, see the compiler's message above" in done.stderr


@pytest.mark.parametrize("text, variables", [(BROKEN, {}), (COMPILER, {"PERCEIVER_KERNELS_CUDA": "0"})])
def test_the_module_of_an_earlier_build_does_not_stay(tree: Tree, text: str, variables: dict[str, str]) -> None:
    tree.nvcc(COMPILER)
    assert tree.build().returncode == 0 and tree.built() == {"_cpu", "_cuda"}
    tree.nvcc(text)
    (tree.folder / "csrc/cuda/one.cu").write_text("// changed")
    assert tree.build(**variables).returncode == 0 and tree.built() == {"_cpu"}


def test_code_for_newer_gpus_is_not_that_of_one_alone(tree: Tree) -> None:
    tree.nvcc(COMPILER)
    assert tree.build(PERCEIVER_KERNELS_CUDA_ARCHS="80;90a").returncode == 0
    compiled = next(line for line in (tree.home / "bin" / "nvcc.log").read_text().splitlines() if "one.cu" in line)
    assert "arch=compute_90a,code=sm_90a" in compiled and compiled.count("code=compute_") == 1
    assert "arch=compute_90,code=compute_90" in compiled


def test_other_gpus(tree: Tree) -> None:
    tree.nvcc(COMPILER)
    done = tree.build(PERCEIVER_KERNELS_CUDA_ARCHS="86;89;120")
    assert done.returncode == 0 and tree.built() == {"_cpu", "_cuda"}, done.stderr
    compiled = next(line for line in (tree.home / "bin" / "nvcc.log").read_text().splitlines() if "one.cu" in line)
    codes = re.findall(r"-gencode=arch=compute_(\w+),code=(\w+)", compiled)
    assert codes == [("86", "sm_86"), ("89", "sm_89"), ("120", "sm_120"), ("120", "compute_120")]
    assert '-DPERCEIVER_KERNELS_CUDA_ARCHS="86;89;120"' in (tree.folder / "c++.log").read_text()


@pytest.mark.parametrize("name, value, message", [
    ("PERCEIVER_KERNELS_CUDA", "yes", "PERCEIVER_KERNELS_CUDA is 'yes', must be 0 (off), 1 (insist) or unset"),
    ("PERCEIVER_KERNELS_CUDA_ARCHS", "sm_90", "PERCEIVER_KERNELS_CUDA_ARCHS is 'sm_90', must be architectures as nvcc"),
    ("PERCEIVER_KERNELS_CUDA_ARCHS", "90;75", "PERCEIVER_KERNELS_CUDA_ARCHS is '90;75', must be architectures as nvcc"),
])  # fmt: skip
def test_bad_values(tree: Tree, name: str, value: str, message: str) -> None:
    tree.nvcc(COMPILER)
    done = tree.build(**{name: value})
    assert done.returncode != 0 and message in done.stderr
