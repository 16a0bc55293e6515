"""Separable attention in Triton, compiled ahead of time: what a pair of a row and a token costs in instructions."""

from __future__ import annotations

from typing import Any

import pytest
from machine_code import Build, Figures, figures, needs_triton

pytest.importorskip("triton")

from perceiver_kernels.backends.triton.separable_attention import BACKWARD_TILES, FORWARD_TILES

pytestmark = needs_triton

INTEGERS = (
    *("form_batch", "rows", "padded_rows", "outer", "columns", "strips", "outer_table", "size_3"),
    *("parts", "part_size", "groups", "group_size"),
)
DIVISIBLE = ("form_batch", "rows", "padded_rows")


def of_rows(kernel: str, rows: int, columns: int, arch: int = 90, **changes: Any) -> Figures:
    """The kernel that sums over tokens for each row: an image with 3 channels and LayerNorm's r, unless changed."""
    signature = dict.fromkeys(INTEGERS, "i32") | {"seed": "i64", "threshold": "i64", "keep_scale": "fp32"}
    pointers = ["form", "tokens", "states", "outer_sums", "column_sums"]
    constants: dict[str, Any] = {
        "C": 3, "AXES": 2, "WITH_R": True, "MASKED": False, "DROPOUT": False, "FEW": True,
        "ROWS": rows, "COLUMNS": columns, "COMPILED": True,
    }  # fmt: skip
    if kernel == "fwd":
        pointers.append("extents")
        signature["extent_blocks"] = "i32"
        constants["TILE_ROWS"] = 64
    else:
        pointers += ["upstream", "statistics"]
        signature["statistics_rows"] = "i32"
    constants |= changes
    further = {f"size_{axis}": axis > 4 - constants["AXES"] for axis in (1, 2)}
    signature |= {name: "i32" for name, exists in further.items() if exists}
    constants |= {name: 1 for name, exists in further.items() if not exists}
    name = f"separable_attention:separable_attention_{kernel}_kernel"
    signature |= dict.fromkeys(pointers, "*fp32")
    return figures(Build(name, signature, constants, arch=arch, warps=1, stages=1, aligned=DIVISIBLE))


@pytest.mark.parametrize("tile", FORWARD_TILES, ids=str)
def test_forward_costs_at_most_17_instructions_per_pair(tile: tuple[int, int]) -> None:
    """By hand it is 12: t, four for the score, EX2, the sum, two marginals, three of acc; and loads, shared by rows."""
    found = of_rows("fwd", *tile)
    assert found.exponentials == tile[0] * tile[1] / 32
    assert found.per_pair <= 15
    assert found.shuffles == found.spills == 0


@pytest.mark.parametrize("tile", BACKWARD_TILES, ids=str)
def test_backward_costs_at_most_24_instructions_per_pair(tile: tuple[int, int]) -> None:
    """By hand it is 17: five for the score, EX2, five for u, their product, two marginals, three of d_a."""
    found = of_rows("bwd_rows", *tile)
    assert found.exponentials == tile[0] * tile[1] / 32
    assert found.per_pair <= 21
    assert found.shuffles == found.spills == 0


@pytest.mark.parametrize("changes", [{"MASKED": True}, {"C": 4}, {"AXES": 3}, {"C": 16, "FEW": False}], ids=str)
@pytest.mark.parametrize(("kernel", "tile"), [("fwd", (128, 8)), ("bwd_rows", (64, 16))])
def test_variants_fit_the_registers(kernel: str, tile: tuple[int, int], changes: dict[str, Any]) -> None:
    found = of_rows(kernel, *tile, **changes)
    assert found.shuffles == found.spills == 0


@pytest.mark.parametrize(("kernel", "tile"), [("fwd", (128, 8)), ("bwd_rows", (64, 16))])
def test_on_sm_80(kernel: str, tile: tuple[int, int]) -> None:
    found = of_rows(kernel, *tile, arch=80)
    assert found.per_pair <= (15 if kernel == "fwd" else 21)
    assert found.shuffles == found.spills == 0


GRID = dict.fromkeys(("outer", "columns", "size_3"), "i32")
STRIDES = {f"{name}_{axis}": "i32" for name in ("x", "r", "mask") for axis in ("batch", "3", "column")}
STRIDES |= {"x_channel": "i32"}
ONE_OUTER_AXIS = {"size_1": 1, "size_2": 1} | {f"{name}_{axis}": 0 for name in ("x", "r", "mask") for axis in (1, 2)}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("data", ["*bf16", "*u8"])
def test_packing_compiles(data: str, arch: int) -> None:
    pointers = {"x": data, "r": "*fp32", "mask": "*i1", "tokens": "*fp32", "extents": "*fp32"}
    constants = ONE_OUTER_AXIS | {"C": 3, "WITH_R": True, "MASKED": True, "COLUMNS": 8, "TILE_ROWS": 64}
    signature = pointers | GRID | STRIDES | {"tile_rows": "i32"}
    found = figures(Build("separable_attention:separable_attention_pack_kernel", signature, constants, arch, stages=1))
    assert found.spills == 0


@pytest.mark.parametrize("forward", [True, False])
def test_merging_compiles(forward: bool) -> None:
    integers = ("rows", "padded_rows", "columns", "outer_table", "outer_slots", "parts", "part_size", "groups")
    signature = dict.fromkeys((*integers, "group_size", "batches"), "i32")
    signature |= {"partials": "*fp32", "result": "*fp32", "outer_sums": "i64", "column_sums": "i64"}
    softmax = {"lse": "*fp64", "total": "*fp32"}
    constants: dict[str, Any] = {"C": 3, "AXES": 2, "FORWARD": forward, "ENTRIES": 16, "ROWS": 32, "COLUMNS": 8}
    constants |= {"SLOTS": 8} | ({} if forward else dict.fromkeys(softmax))
    signature |= softmax if forward else {}
    found = figures(Build("separable_merge:separable_merge_kernel", signature, constants, stages=1))
    assert found.spills == 0


def test_preparing_backward_compiles() -> None:
    signature = dict.fromkeys(("sums", "total", "d_sums", "d_total", "statistics"), "*fp32")
    signature |= dict.fromkeys(("lse", "d_lse"), "*fp64")
    integers = ("rows", "padded_rows", "entries", "lse_batch", "lse_row", "total_batch", "total_row")
    signature |= dict.fromkeys(integers, "i32")
    constants = {"DROPOUT": True, "ROWS": 32, "ENTRIES": 32}
    name = "separable_attention:separable_attention_bwd_prepare_kernel"
    assert figures(Build(name, signature, constants, stages=1)).spills == 0


@pytest.mark.parametrize(("data", "channels", "warps", "tile"), [("*fp32", 3, 1, (8, 64)), ("*bf16", 128, 8, (16, 32))])
def test_gradients_of_tokens_compile(data: str, channels: int, warps: int, tile: tuple[int, int]) -> None:
    signature = dict.fromkeys(("form", "upstream", "statistics", "r", "d_r"), "*fp32")
    signature |= {"x": data, "d_x": data, "mask": "*i1", "seed": "i64", "threshold": "i64", "keep_scale": "fp32"}
    signature |= GRID | STRIDES | dict.fromkeys(("form_batch", "rows", "padded_rows", "outer_table"), "i32")
    constants = ONE_OUTER_AXIS | {
        "C": channels, "AXES": 2, "WITH_R": True, "MASKED": True, "DROPOUT": False, "NEEDS_X": True, "NEEDS_R": True,
        "FEW": channels <= 4, "CHANNELS": max(channels, 16), "ROWS": tile[0], "TOKENS": tile[1],
        "PRECISION": "ieee", "COMPILED": True,
    }  # fmt: skip
    name = "separable_attention_tokens:separable_attention_bwd_tokens_kernel"
    assert figures(Build(name, signature, constants, warps=warps)).spills == 0
