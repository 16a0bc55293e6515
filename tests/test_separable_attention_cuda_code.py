"""Separable attention's rows in CUDA C++: the kernels' machine code, and how the work is divided among blocks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import cuda_emulation
import machine_code
import pytest


def figures(kernel: str, channels: int, one_outer: bool, careful: bool, arch: str) -> machine_code.Figures:
    """`one_outer`: for grids of at most two axes; `careful`: for masks and dropout. 0 channels: many, with dropout."""
    arguments = f"ILi{channels}ELb{one_outer:d}ELb{careful:d}E"
    return machine_code.built(f"separable_attention_{kernel}_kernel", arch, arguments)


# Instructions per pair on grids of one or two axes. By hand it is 12 for three channels forward: five of the score,
# EX2, the total, three of acc, two of marginals. Backward it is 17: a second form of five and dS, no total. Each tile
# row of 32 pairs adds loads of tokens and what its outer position takes.
PER_PAIR = {
    ("fwd", 1): 10.0,
    ("fwd", 2): 12.0,
    ("fwd", 3): 14.0,
    ("fwd", 4): 16.2,
    ("bwd_rows", 1): 13.5,
    ("bwd_rows", 2): 16.5,
    ("bwd_rows", 3): 19.5,
    ("bwd_rows", 4): 22.6,
}


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize(("kernel", "channels"), PER_PAIR)
def test_main_loop(kernel: str, channels: int, arch: str) -> None:
    found = figures(kernel, channels, True, False, arch)
    assert found.exponentials == 32
    assert found.per_pair <= PER_PAIR[kernel, channels]
    assert found.spills <= (2 if channels == 4 else 0)  # those two are not in the loop
    assert found.shuffles == 0
    if (kernel, channels) != ("bwd_rows", 4):
        assert found.registers <= 168  # three blocks of 128 threads on a multiprocessor


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize(("kernel", "per_pair"), [("fwd", 16.0), ("bwd_rows", 22.2)])
def test_main_loop_of_more_axes(kernel: str, per_pair: float, arch: str) -> None:
    """A third and a fourth axis: outer positions have several table entries and marginals."""
    found = figures(kernel, 3, False, False, arch)
    assert found.exponentials == 32
    assert found.per_pair <= per_pair


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("kernel", ["fwd", "bwd_rows"])
@pytest.mark.parametrize(
    ("channels", "one_outer", "careful"),
    [(0, False, True), *((c, *kind) for c in (1, 2, 3, 4) for kind in ((True, False), (False, False), (False, True)))],
)
def test_registers_suffice(channels: int, kernel: str, one_outer: bool, careful: bool, arch: str) -> None:
    """What masks, dropout, more axes or many channels spill is once a strip, not once a tile row."""
    found = figures(kernel, channels, one_outer, careful, arch)
    assert found.spills <= (2 if one_outer else 10)


@pytest.mark.parametrize("kernel", ["fwd", "bwd_rows"])
@pytest.mark.parametrize(("channels", "one_outer"), [(0, False), (3, True)])
def test_tokens_come_by_asynchronous_copies(channels: int, one_outer: bool, kernel: str) -> None:
    for arch, copies in [("80", "LDGSTS"), ("90a", "UBLKCP")]:
        operations = figures(kernel, channels, one_outer, not one_outer, arch).operations
        assert any(operation.startswith(copies) for operation in operations), arch


PRINT_SPLIT = """
#include <cstdio>
#include "separable_rows.h"
int main(int, char** arguments) {
  using namespace pk::cuda;
  Grid grid{};
  int* const fields[] = {&grid.batch, &grid.rows, &grid.outer, &grid.columns};
  for (int i = 0; i < 4; ++i) *fields[i] = atoi(arguments[1 + i]);
  grid.padded_rows = (grid.rows + kBlockRows - 1) / kBlockRows * kBlockRows;
  grid.channels = 3, grid.strips = (grid.columns + kColumns - 1) / kColumns;
  grid.outer_axes = 1, grid.outer_entries = grid.sizes[0] = grid.outer;
  const Split split = split_of(grid, 132);
  printf("%d %d %d %d", grid.row_blocks(), split.slots(), split.group_size, split.part_size);
}
"""


@pytest.fixture(scope="module")
def print_split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = cuda_emulation.compiler()
    if not compiler:
        pytest.skip("there is no C++ compiler")
    program = tmp_path_factory.mktemp("split") / "print_split"
    flags = ["-std=c++17", "-O0", "-w", "-DEMULATED_ARCH=900", f"-I{cuda_emulation.HERE}", f"-I{cuda_emulation.CUDA}"]
    command = [*compiler, *flags, "-x", "c++", "-", str(cuda_emulation.HERE / "emulation.cpp"), "-o", str(program)]
    subprocess.run(command, input=PRINT_SPLIT, text=True, check=True)
    return program


@pytest.mark.parametrize("grid", [(224, 224), (128, 128), (512, 512)], ids=str)
@pytest.mark.parametrize(("batch", "rows"), [(1, 32), (1, 64), (1, 128), (1, 256), (1, 512), (8, 512), (64, 512)])
def test_few_rows_fill_a_gpu(print_split: Path, batch: int, rows: int, grid: tuple[int, int]) -> None:
    """The multiprocessor of 132 with most to do has at most a fifth more than the mean."""
    arguments = [str(print_split), *map(str, (batch, rows, *grid))]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    row_blocks, slots, group_size, part_size = map(int, done.stdout.split())
    blocks = batch * row_blocks * slots
    tile_rows = batch * row_blocks * -(-grid[1] // 16) * grid[0]
    assert -(-blocks // 132) * group_size * part_size <= 1.2 * tile_rows / 132
