"""The Triton backend's foundations: dropout, tile choices, dispatch, and what the machine code's reader counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from machine_code import busiest_loop, read, shortest_round
from shapes import device_of

import perceiver_kernels as pk
from perceiver_kernels import dispatch
from perceiver_kernels.backends.reference.philox import dropout_scales
from perceiver_kernels.backends.triton import runtime, tiles
from perceiver_kernels.backends.triton.tiles import Tiles

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from perceiver_kernels.backends.triton.philox import keep_scales, threshold  # noqa: E402


@triton.jit
def keep_kernel(out, seed, threshold, keep_scale, rows, tokens, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    batch = tl.program_id(0)
    row, token = tl.arange(0, ROWS)[:, None], tl.arange(0, TOKENS)[None, :]
    scales = keep_scales(seed, batch, row, token, threshold, keep_scale)
    tl.store(out + (batch * rows + row) * tokens + token, scales, mask=(row < rows) & (token < tokens))


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.999])
def test_dropout_is_the_references(seed: int, dropout_p: float) -> None:
    shape = torch.Size((3, 5, 13))
    out = torch.empty(shape, device=device_of("triton"))
    keep_kernel[(3,)](out, seed, threshold(dropout_p), 1 / (1 - dropout_p), 5, 13, ROWS=8, TOKENS=16)
    torch.testing.assert_close(out.cpu(), dropout_scales(shape, dropout_p, seed, torch.float32, torch.device("cpu")))


def test_importing_the_library_does_not_import_triton() -> None:
    code = "import sys, perceiver_kernels; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_interpreter_runs_only_for_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = dispatch.Declaration(
        "an op", "triton", lambda: runtime, ("cuda",), (torch.float32,), (torch.float32,),
        devices_if_forced=runtime.devices_if_forced,
    )  # fmt: skip
    call = dispatch.Call("an op", "cpu", torch.float32, torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert entry.not_supported_reasons(call) == ["device is cpu, where it runs only if asked for by name"]
    with pk.use_backend("triton"):
        assert not entry.not_supported_reasons(call)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pk.use_backend("triton"):
        assert entry.not_supported_reasons(call) == ["device is cpu, must be cuda"]


class Timer:
    """Stands in for a clock on a GPU: the more rows, the faster."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[Tiles] = []
        monkeypatch.setattr("triton.testing.do_bench", lambda run, **_: -run().rows)

    def run(self, choice: Tiles) -> Tiles:
        self.runs.append(choice)
        return choice


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Timer:
    monkeypatch.setattr(tiles, "_choices", {})
    monkeypatch.setattr(tiles, "_read", None)
    for variable in (tiles.AUTOTUNE, tiles.FILE):
        monkeypatch.delenv(variable, raising=False)
    return Timer(monkeypatch)


SMALL, LARGE = Tiles(16, 16), Tiles(64, 16, warps=8)


def test_nothing_is_measured_unless_asked_for(timer: Timer) -> None:
    assert tiles.choose("kernel", (1, 2), SMALL, [LARGE], timer.run) == SMALL
    assert not timer.runs


def test_autotuning_measures_once_and_remembers_in_the_file(
    timer: Timer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiles.json"
    monkeypatch.setenv(tiles.FILE, str(file))
    assert tiles.choose("kernel", (1, 2), SMALL, [LARGE], timer.run) == SMALL
    monkeypatch.setenv(tiles.AUTOTUNE, "1")
    assert tiles.choose("kernel", (1, 2), SMALL, [LARGE], timer.run) == LARGE
    assert timer.runs == [SMALL, LARGE]
    assert tiles.choose("kernel", (1, 2), SMALL, [LARGE], timer.run) == LARGE
    assert timer.runs == [SMALL, LARGE]
    assert len(json.loads(file.read_text())) == 1

    monkeypatch.setattr(tiles, "_choices", {})
    monkeypatch.setattr(tiles, "_read", None)
    monkeypatch.delenv(tiles.AUTOTUNE)
    assert tiles.choose("kernel", (1, 2), SMALL, [LARGE], timer.run) == LARGE
    assert tiles.choose("kernel", (1, 3), SMALL, [LARGE], timer.run) == SMALL
    assert timer.runs == [SMALL, LARGE]


def test_ways_are_measured_once_and_remembered_with_the_tiles(
    timer: Timer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a way is timed, the tiles of its kernel are chosen."""
    file = tmp_path / "tiles.json"
    measured: list[Tiles] = []
    monkeypatch.setenv(tiles.FILE, str(file))
    runs = {"small": lambda: tiles.choose("kernel", (), SMALL, [SMALL], measured.append), "large": lambda: LARGE}
    assert tiles.choose_by_name("way", (1, 2), "small", runs) == "small"
    monkeypatch.setattr("triton.testing.do_bench", lambda run, **_: -getattr(run(), "rows", 0))
    monkeypatch.setenv(tiles.AUTOTUNE, "1")
    assert tiles.choose_by_name("way", (1, 2), "small", runs) == "large"
    assert measured
    count = len(measured)
    assert tiles.choose_by_name("way", (1, 2), "small", runs) == "large"
    assert len(measured) == count
    assert sorted(key.split("|")[0] for key in json.loads(file.read_text())) == ["kernel", "way"]

    monkeypatch.setattr(tiles, "_choices", {})
    monkeypatch.setattr(tiles, "_read", None)
    monkeypatch.delenv(tiles.AUTOTUNE)
    assert tiles.choose_by_name("way", (1, 2), "small") == "large"
    assert tiles.choose_by_name("way", (1, 3), "small") == "small"


ASSEMBLY = """
.L_x_0:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   FADD R2, R2, R3 ;
.L_x_2:
        /*0020*/              @!P0 MUFU.EX2 R4, R4 ;
        /*0030*/                   FADD R5, R4, R5 ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/               @P2 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3);
"""


def test_the_reader_finds_the_innermost_loop_with_exponentials() -> None:
    assert busiest_loop(*read(ASSEMBLY)) == ["MUFU.EX2", "FADD", "BRA"]


ROUNDS = """
.L_x_0:
        /*0000*/                   LDS R2, [R2] ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   MUFU.EX2 R3, R3 ;
        /*0030*/               @P1 BRA P2, `(.L_x_1) ;
        /*0040*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/                   MUFU.EX2 R4, R4 ;
        /*0060*/                   MUFU.EX2 R5, R5 ;
.L_x_3:
        /*0070*/               @P3 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
"""


def test_the_shortest_way_round_a_loop_meets_its_exponentials_and_skips_what_it_may() -> None:
    assert shortest_round(ROUNDS) == (5, 2)  # and neither the inner loop nor the branch to its end


def test_tf32_is_read_however_it_was_set() -> None:
    """In a process of its own: torch lets nobody read the older setting once the newer one has been written."""
    code = (
        "import torch; from perceiver_kernels.backends.triton.runtime import input_precision as precision\n"
        "assert (precision(torch.float32), precision(torch.bfloat16)) == ('ieee', 'ieee')\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "assert (precision(torch.float32), precision(torch.bfloat16)) == ('tf32', 'ieee')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
