"""Other forms of a weight (packed, converted), made when it is met again and kept as long as it is unchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_SAMPLED = 8  # rows and columns


@dataclass
class _Known:
    """What is known of one weight: its state when last looked at, and the forms made of that state."""

    state: tuple[Any, ...]
    sample: Tensor
    # Kept so that no other memory can come to lie at the address that `state` names.
    storage: torch.UntypedStorage
    forms: dict[str, Any] = field(default_factory=dict)


class PreparedWeights:
    """Forms of weights, forgotten with the weight and when it changes.

    A change shows in torch's version counter (optimizers, load_state_dict), in the address (`.data` swaps), and, where
    neither moves (in-place writes through `.data`), in a sample of the elements. A form is made when an unchanged
    weight is met for the second time: in training, where every step changes it, making it would not pay.
    """

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return sum(len(known.forms) for known in self._known.values())

    def clear(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def get(self, weight: Tensor, form: str, make: Callable[[], Any], *, at_once: bool = False) -> Any | None:
        """The form of the weight as it is now, or None where it is met for the first time.

        Args:
            weight: two-dimensional.
            form: its name.
            make: makes it.
            at_once: make it even on first sight, because that pays for itself in a single use.
        """
        if weight.is_inference():  # has no version counter
            return make() if at_once else None
        known = self._known.get(weight)
        state = (weight._version, weight.data_ptr(), weight.shape, weight.stride(), weight.dtype)
        if known is not None and known.state == state and torch.equal(known.sample, _sample(weight)):
            if form not in known.forms:
                known.forms[form] = make()
            return known.forms[form]
        known = _Known(state, _sample(weight).clone(), weight.untyped_storage())
        self._known[weight] = known
        if not at_once:
            return None
        known.forms[form] = make()
        return known.forms[form]


def _sample(weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    return weight.detach()[:: max(1, rows // _SAMPLED), :: max(1, columns // _SAMPLED)]
