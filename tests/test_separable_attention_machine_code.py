"""Separable attention in Triton, compiled ahead of time: what a pair of a row and a token costs in instructions."""

from __future__ import annotations

from typing import Any

import pytest
from machine_code import Build, Figures, figures

pytest.importorskip("triton")

INTEGERS = (
    *("form_batch", "rows", "padded_rows", "statistics_rows", "outer", "columns", "strips", "outer_table", "size_1"),
    *("parts", "part_size", "groups", "group_size"),
)
DIVISIBLE = ("form_batch", "rows", "padded_rows", "statistics_rows")


def of_rows(kernel: str, rows: int, columns: int, arch: int = 90, **changes: Any) -> Figures:
    """The kernel that sums over tokens for each row: an image with 3 channels and LayerNorm's r, unless changed."""
    signature = dict.fromkeys(INTEGERS, "i32") | {"seed": "i64", "threshold": "i64", "keep_scale": "fp32"}
    pointers = ["form", "tokens", "states", "outer_sums", "column_sums"]
    constants: dict[str, Any] = {
        "C": 3, "AXES": 2, "WITH_R": True, "MASKED": False, "DROPOUT": False, "FEW": True,
        "ROWS": rows, "COLUMNS": columns, "INTERPRETED": False,
    }  # fmt: skip
    if kernel == "fwd":
        pointers.append("extents")
        signature["extent_blocks"] = "i32"
        constants["TILE_ROWS"] = 64
    else:
        pointers += ["upstream", "statistics"]
    constants |= changes
    further = {f"size_{axis}": axis < constants["AXES"] for axis in (2, 3)}
    signature |= {name: "i32" for name, exists in further.items() if exists}
    constants |= {name: 1 for name, exists in further.items() if not exists}
    name = f"separable_attention:separable_attention_{kernel}_kernel"
    signature |= dict.fromkeys(pointers, "*fp32")
    return figures(Build(name, signature, constants, arch=arch, warps=1, stages=1, aligned=DIVISIBLE))


@pytest.mark.parametrize("tile", [(128, 8), (64, 16), (32, 16)], ids=str)
def test_forward_costs_17_instructions_per_pair(tile: tuple[int, int]) -> None:
    """By hand it is 12: t, four for the score, EX2, the sum, two marginals, three of acc; and loads, shared by rows."""
    found = of_rows("fwd", *tile)
    assert found.exponentials == tile[0] * tile[1] / 32
    assert found.per_pair <= 17
    assert found.shuffles == found.spills == 0


@pytest.mark.parametrize("tile", [(64, 16), (64, 8), (32, 16)], ids=str)
def test_backward_costs_24_instructions_per_pair(tile: tuple[int, int]) -> None:
    """By hand it is 17: five for the score, EX2, five for u, their product, two marginals, three of d_a."""
    found = of_rows("bwd_rows", *tile)
    assert found.exponentials == tile[0] * tile[1] / 32
    assert found.per_pair <= 24
    assert found.shuffles == found.spills == 0
