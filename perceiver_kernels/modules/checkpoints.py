"""Key maps that let today's modules load checkpoints of perceiver-pytorch's earlier releases."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Up to 0.10 a layer was a list: cross-attention, its MLP, the self-attention blocks and (0.10) the attention residual.
_LAYER_PARTS = {
    "0": r"layers.\1.cross_attn.",
    "1": r"layers.\1.cross_ff.",
    "2": r"layers.\1.self_attns.",
    "3": r"attn_residuals.\1.",
}
_LIST_LAYER = re.compile(r"^layers\.(\d+)\.([0-3])\.")

# The same of PerceiverIO, whose encoder was a list too.
_IO_PARTS = (
    (re.compile(r"^cross_attend_blocks\.0\."), "cross_attend_block.cross_attn."),
    (re.compile(r"^cross_attend_blocks\.1\."), "cross_attend_block.cross_ff."),
    (re.compile(r"^layers\.(\d+)\.([01])\."), r"layers.\1.self_attns.0.\2."),
    (re.compile(r"^layers\.(\d+)\.2\."), r"attn_residuals.\1."),
)

# Before 0.8 the dropout of attention stood in to_out, and that of the MLP before its last linear map.
_EARLY_NAMES = {".fn.to_out.0.": ".fn.to_out.", ".fn.net.3.": ".fn.net.2."}

# Up to 0.7.0 the mean over the latents was not an entry of to_logits, so LayerNorm and Linear stood one place earlier.
_EARLY_HEAD_NORM = "to_logits.0.weight"
_HEAD = re.compile(r"^to_logits\.([01])\.")


def upgrade_state_dict(state_dict: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Rename the keys of a `Perceiver` checkpoint of any perceiver-pytorch release since 0.2 to those of 0.11.

    `layers.i.{0,1,2}` become `layers.i.{cross_attn,cross_ff,self_attns}`, and releases before 0.8 differ in a few more;
    keys that are up to date stay as they are.
    Releases before 0.7.4 spaced their Fourier frequencies logarithmically: such weights load, but were trained on other
    position features than `Perceiver` computes. Those recognisable by their keys (up to 0.7.0) raise a warning.

    Args:
        state_dict: the checkpoint; it is not changed.
        prefix: of the Perceiver's keys when it is a part of a larger model, such as "encoder.". Other keys are kept.

    Returns:
        A new dict of the same tensors in the same order.
    """
    early_head = prefix + _EARLY_HEAD_NORM in state_dict
    if early_head:
        warnings.warn(
            "this checkpoint is of perceiver-pytorch 0.7.0 or earlier, which spaced the Fourier frequencies otherwise: "
            "a model with fourier_encode_data=True will not compute what these weights were trained for",
            stacklevel=2,
        )
    return {
        prefix + _upgrade_key(key.removeprefix(prefix), early_head) if key.startswith(prefix) else key: value
        for key, value in state_dict.items()
    }


def _upgrade_key(key: str, early_head: bool) -> str:
    for early, name in _EARLY_NAMES.items():
        key = key.replace(early, name)
    if layer := _LIST_LAYER.match(key):
        return layer.expand(_LAYER_PARTS[layer[2]]) + key[layer.end() :]
    if early_head and (head := _HEAD.match(key)):
        return f"to_logits.{int(head[1]) + 1}." + key[head.end() :]
    return key


def upgrade_before_loading(module: Any, state_dict: dict[str, Tensor], prefix: str, *unused: Any) -> None:
    """The load_state_dict pre-hook of `Perceiver`: upgrade the keys in place."""
    _replace(state_dict, upgrade_state_dict(state_dict, prefix))


def upgrade_io_before_loading(module: Any, state_dict: dict[str, Tensor], prefix: str, *unused: Any) -> None:
    """The load_state_dict pre-hook of `PerceiverIO`: keys of releases 0.8 to 0.10 become those of 0.11, in place."""
    upgraded = {
        prefix + _upgrade_io_key(key.removeprefix(prefix)) if key.startswith(prefix) else key: value
        for key, value in state_dict.items()
    }
    _replace(state_dict, upgraded)


def _upgrade_io_key(key: str) -> str:
    for pattern, name in _IO_PARTS:
        key = pattern.sub(name, key)
    return key


def _replace(state_dict: dict[str, Tensor], upgraded: dict[str, Tensor]) -> None:
    state_dict.clear()
    state_dict.update(upgraded)
