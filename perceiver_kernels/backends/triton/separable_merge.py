"""Partial sums of separable attention: what programs leave, and the kernel that adds it in an order set by shapes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_kernels.backends.triton import runtime, tiles
from perceiver_kernels.backends.triton.exponential import LN2
from perceiver_kernels.backends.triton.separable_forms import program_indices
from perceiver_kernels.backends.triton.separable_geometry import Geometry, Split
from perceiver_kernels.backends.triton.tiles import Tiles


@triton.jit
def separable_merge_kernel(
    partials,
    result,
    lse,
    total,
    rows,
    padded_rows,
    columns,
    outer_table,
    outer_slots,
    outer_sums,
    column_sums,
    parts,
    part_size,
    groups,
    group_size,
    batches,
    C: tl.constexpr,
    AXES: tl.constexpr,
    FORWARD: tl.constexpr,
    ENTRIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Adds the programs' partial sums of ENTRIES entries of ROWS rows: forward's as states merge, divided by the sum of
    the weights; backward's as they are, over `batches` entries of the batch where all of them share a form.

    partials: the states, the marginals of the outer axes from element outer_sums on, those of the columns from element
    column_sums on.
    """
    entries = C + outer_table + columns
    block, entry_block, batch = program_indices(tl.cdiv(rows, ROWS), tl.cdiv(entries, ENTRIES))
    row = block * ROWS + tl.arange(0, ROWS)
    live = row < rows
    padded = tl.cast(padded_rows, tl.int64)
    slots = groups * parts
    states = partials + batch * slots * (C + 3) * padded + row[None, :]
    reference, weight = tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), 1.0, tl.float32)
    if FORWARD:
        reference, weight, kept = merged_weights(states, slots, padded, C, ROWS, SLOTS)
        empty = weight == 0
        weight = tl.where(empty, 1.0, weight)
        if entry_block == 0:
            exact = LN2 * reference.to(tl.float64) + tl.log(weight.to(tl.float64))
            tl.store(lse + batch * rows + row, tl.where(empty, -float("inf"), exact), mask=live)
            tl.store(total + batch * rows + row, tl.where(empty, 0.0, kept / weight), mask=live)

    # Which slots hold a part of an entry: `count` of them from `first` on, `step` apart; and where their parts are.
    entry = entry_block * ENTRIES + tl.arange(0, ENTRIES)
    of_column, of_outer = entry >= C + outer_table, (entry >= C) & (entry < C + outer_table)
    of_groups = of_outer & (AXES == 2)
    column = entry - C - outer_table
    count = tl.where(of_column, parts, tl.where(of_groups, groups, slots))
    step = tl.where(of_groups, parts, 1)
    first = tl.where(of_column, column // (COLUMNS * group_size) * parts, 0)
    first = tl.where(of_groups, (entry - C) // part_size, first)
    size = tl.where(of_column, columns, tl.where(of_outer, outer_table, C + 3)).to(tl.int64)
    of_batch = tl.where(of_column, parts, tl.where(of_outer, outer_slots, slots)) * size
    begin = tl.where(of_column, column_sums + column * padded, entry * padded)
    begin = tl.where(of_outer, outer_sums + (entry - C) * padded, begin)

    value = tl.zeros((ENTRIES, ROWS), tl.float32)
    for b in range(batch, batch + batches):
        of_row = partials + ((begin + b * of_batch * padded)[:, None] + row[None, :])[None, :, :]
        for start in range(0, slots, SLOTS):
            index = (start + tl.arange(0, SLOTS))[:, None]
            there = ((index < count[None, :]) & (entry < entries)[None, :])[:, :, None]
            partial = tl.load(of_row + (index * size[None, :] * padded)[:, :, None], mask=there, other=0.0)
            if FORWARD:
                slot = first[None, :] + index * step[None, :]
                at = states[None, :, :] + (slot * ((C + 3) * padded) + (C + 2) * padded)[:, :, None]
                partial *= tl.exp2(tl.load(at, mask=there, other=-float("inf")) - reference[None, None, :])
            value += tl.sum(partial, 0)
    target = result + (batch * entries + entry)[:, None] * rows + row[None, :]
    tl.store(target, value / weight[None, :], mask=(entry < entries)[:, None] & live[None, :])


@triton.jit
def merged_weights(states, slots, padded, C: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """The largest of the slots' references, and the sums of the weights, before and after dropout, relative to it."""
    reference = tl.full((ROWS,), -float("inf"), tl.float32)
    for start in range(0, slots, SLOTS):
        slot = (start + tl.arange(0, SLOTS))[:, None]
        at = states + (slot * (C + 3) + C + 2) * padded
        reference = tl.maximum(reference, tl.max(tl.load(at, mask=slot < slots, other=-float("inf")), 0))
    reference = tl.where(reference == -float("inf"), 0.0, reference)
    weight, kept = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(0, slots, SLOTS):
        slot = (start + tl.arange(0, SLOTS))[:, None]
        at = states + (slot * (C + 3) + C) * padded
        there = slot < slots
        factor = tl.exp2(tl.load(at + 2 * padded, mask=there, other=-float("inf")) - reference[None, :])
        weight += tl.sum(factor * tl.load(at, mask=there, other=0.0), 0)
        kept += tl.sum(factor * tl.load(at + padded, mask=there, other=0.0), 0)
    return reference, weight, kept


class Partials:
    """What programs leave for the merge kernel, in one array; it starts at zero, for programs add to their sums."""

    def __init__(self, geometry: Geometry, split: Split, choice: Tiles, device: torch.device) -> None:
        self.geometry, self.split, self.choice = geometry, split, choice
        self.padded_rows = triton.cdiv(geometry.rows, choice.rows) * choice.rows
        self.outer_slots = split.slots if geometry.axes > 2 else split.groups
        of_rows = geometry.batch * self.padded_rows
        self.outer_sums = of_rows * split.slots * (geometry.channels + 3)
        self.column_sums = self.outer_sums + of_rows * self.outer_slots * geometry.outer_table
        self.array = torch.zeros(self.column_sums + of_rows * split.parts * geometry.columns, device=device)

    def arguments(self) -> dict[str, Tensor]:
        """As the kernels that leave them name them."""
        return {
            "states": self.array,
            "outer_sums": self.array[self.outer_sums :],
            "column_sums": self.array[self.column_sums :],
        }

    def merge(self, result: Tensor, *softmax: Tensor) -> None:
        """Into result, with lse and total where these are states of a softmax."""
        geometry = self.geometry
        rows, entries = 32, 16
        programs = triton.cdiv(geometry.rows, rows) * triton.cdiv(result.shape[1], entries) * result.shape[0]
        separable_merge_kernel[(programs,)](
            self.array,
            result,
            *(softmax or (None, None)),
            geometry.rows,
            self.padded_rows,
            geometry.columns,
            geometry.outer_table,
            self.outer_slots,
            self.outer_sums,
            self.column_sums,
            **self.split.arguments(),
            batches=geometry.batch // result.shape[0],
            C=geometry.channels,
            AXES=geometry.axes,
            FORWARD=bool(softmax),
            ENTRIES=entries,
            ROWS=rows,
            COLUMNS=self.choice.columns,
            SLOTS=min(tiles.next_power_of_2(self.split.slots), 8),
            num_warps=4,
            num_stages=1,
            **runtime.LAUNCH_OPTIONS,
        )
