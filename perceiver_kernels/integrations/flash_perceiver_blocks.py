"""Swapped modules of flash-perceiver on top of flash-attn: its attention and its blocks."""

# The attributes of another library's modules have no types.
# mypy: disable-error-code="attr-defined,misc,no-any-return,union-attr"

from __future__ import annotations

from typing import Any

from flash_perceiver import perceiver as theirs
from torch import Tensor

from perceiver_kernels.integrations import flash_attn_stand_ins as ours
from perceiver_kernels.integrations.flash_attention import (
    activation_of,
    attend,
    parts_of_attention,
    parts_of_block,
    run_block,
)
from perceiver_kernels.integrations.parts import all_stock, obstacle
from perceiver_kernels.integrations.swap import Accelerated, Left, Swap

# What flash_attn's MHA and Block can do besides what flash-perceiver asks of them, and their values for "no".
_PLAIN_ATTENTION = {"causal": False, "dwconv": False, "return_residual": False, "checkpointing": False}
_PLAIN_BLOCK = {"prenorm": True, "fused_dropout_add_ln": False, "return_residual": False, "residual_in_fp32": False}
_DROPS = ("dropout1", "drop_path1", "dropout2", "drop_path2")
_LENGTHS_AND_MASK = {"key_padding_mask", "cu_seqlens", "max_seqlen", "cu_seqlens_k", "max_seqlen_k"}


class PatchedMHA(theirs.PatchedMHA, Accelerated):
    """flash-perceiver's attention."""

    def forward(self, x: Tensor, x_kv: Tensor | None = None, **arguments: Any) -> Tensor:
        given = {name: value for name, value in arguments.items() if value is not None}
        if not given.keys() <= _LENGTHS_AND_MASK or not all_stock(parts_of_attention(self)):
            return super().forward(x, x_kv, **arguments)
        return attend(self, x, x_kv, **given)


class Block(theirs.Block, Accelerated):
    """flash-attn's block, its LayerNorm and MLP in one where the operators have the activation."""

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        mixer_subset: Any = None,
        mixer_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        drops = self.training and any(getattr(getattr(self, name, None), "p", 0.0) for name in _DROPS)
        if mixer_subset is not None or drops:
            return super().forward(hidden_states, residual, mixer_subset=mixer_subset, mixer_kwargs=mixer_kwargs)
        return run_block(self, hidden_states, residual, mixer_kwargs)


def plan_module(name: str, module: Any) -> Swap | Left | None:
    """What becomes of one module, or None if it is not one of flash-perceiver's blocks or attentions."""
    if type(module) is ours.Block:
        return Left(name, module, "it is this library's already, in place of flash-attn's")
    if type(module) is theirs.PatchedMHA and not isinstance(module, ours.MHA):
        why = _differs(module, _PLAIN_ATTENTION) or obstacle(parts_of_attention(module)) or _attention_obstacle(module)
        return Swap(name, module, PatchedMHA) if why is None else Left(name, module, why)
    if type(module) is theirs.Block:
        why = _differs(module, _PLAIN_BLOCK) or obstacle(parts_of_block(module))
        if why is None and activation_of(module.mlp) is None:
            why = "mlp has an activation that the operators do not"
        return Swap(name, module, Block) if why is None else Left(name, module, why)
    return None


def _differs(module: Any, expected: dict[str, Any]) -> str | None:
    for name, value in expected.items():
        if getattr(module, name, value) != value:
            return f"{name} is {getattr(module, name)}, must be {value}"
    return None


def _attention_obstacle(mha: Any) -> str | None:
    if getattr(mha, "rotary_emb_dim", 0):
        return "rotary embeddings run as before"
    if getattr(mha, "num_heads_kv", mha.num_heads) != mha.num_heads:
        return f"num_heads_kv is {mha.num_heads_kv}, must be num_heads {mha.num_heads}"
    return None
