"""Which backend runs a call: declarations, forcing, explanations."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import threading

import pytest
import torch

import perceiver_kernels as pk
from perceiver_kernels import dispatch
from perceiver_kernels.ops.separable_attention import OP


def arguments() -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    return torch.zeros(1, 2, 3), [torch.zeros(1, 2, 4), torch.zeros(1, 2, 5)], torch.zeros(1, 20, 3)


def call(**changes: object) -> dispatch.Call:
    fields = {"op": OP, "device": "cpu", "compute_dtype": torch.float32, "data_dtype": torch.float32, "axes": 2}
    return dispatch.Call(**{**fields, "channels": 3, **changes})  # type: ignore[arg-type]


def test_the_reference_comes_last_and_supports_what_others_do() -> None:
    for op in {entry.op for entry in dispatch.declarations()}:
        *others, reference = dispatch.declarations(op)
        assert reference.backend == "reference"
        for other in others:
            assert set(other.compute_dtypes) <= set(reference.compute_dtypes)
            assert set(other.data_dtypes) <= set(reference.data_dtypes)


def test_the_first_that_supports_a_call_runs_it() -> None:
    assert dispatch.select(call()).backend == "native"
    assert dispatch.select(call(device="meta")).backend == "reference"
    assert dispatch.select(call(channels=200)).backend == "reference"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cuda"}, "device is cuda, must be cpu"),
        ({"compute_dtype": torch.float16}, "compute dtype is float16, must be float32 or float64"),
        ({"data_dtype": torch.int32}, "data dtype is int32, must be float32 or float64 or bfloat16"),
        ({"axes": 5}, "axes is 5, must be from 1 to 4"),
        ({"channels": 129}, "channels is 129, must be from 1 to 128"),
    ],
)
def test_a_forced_backend_lists_its_reasons(changes: dict[str, object], reason: str) -> None:
    with pk.use_backend("native"), pytest.raises(pk.BackendError, match=reason):
        dispatch.select(call(**changes))


@pytest.mark.parametrize(
    ("head_dims", "reasons"),
    [
        (None, []),
        ((64, 64), []),
        ((96, 96), ["head_dim is 96, must be 64 or 128"]),
        ((64, 128), ["head_dim_v is 128, must be 64 as head_dim is"]),
    ],
)
def test_head_dims_are_some_values_for_queries_keys_and_values_alike(
    head_dims: tuple[int, int] | None, reasons: list[str]
) -> None:
    entry = dataclasses.replace(dispatch.declarations(OP)[-1], head_dims=(64, 128))
    assert entry.not_supported_reasons(call(head_dims=head_dims)) == reasons
    assert not dispatch.declarations(OP)[-1].not_supported_reasons(call(head_dims=(96, 7)))


def test_use_backend_nests_and_comes_back_after_an_error() -> None:
    assert dispatch.current_backend() == "auto"
    with pk.use_backend("reference"):
        with pytest.raises(KeyError), pk.use_backend("native"):
            assert dispatch.current_backend() == "native"
            raise KeyError
        assert dispatch.current_backend() == "reference"
    assert dispatch.current_backend() == "auto"


def test_use_backend_as_a_function_holds_until_changed_and_in_its_thread_only() -> None:
    try:
        pk.use_backend("reference")
        seen: list[str] = []
        thread = threading.Thread(target=lambda: seen.append(dispatch.current_backend()))
        thread.start()
        thread.join()
        assert (dispatch.current_backend(), seen) == ("reference", ["auto"])
    finally:
        pk.use_backend("auto")


def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match="name is 'fastest', must be one of auto, cuda, triton, native, reference"):
        pk.use_backend("fastest")
    with pytest.raises(ValueError, match="op is 'softmax', must be one of"):
        pk.explain("softmax")
    with pytest.raises(ValueError, match="op is 'softmax', must be one of"):
        dispatch.declarations("softmax")


def test_explain() -> None:
    text = pk.explain(pk.separable_attention, *arguments())
    assert "native: runs this call" in text
    assert "reference: would do" in text
    assert re.search("cuda: no, .*device is cpu", text)
    assert "cuda: no, it has no linear" in pk.explain("linear", torch.zeros(1, 2), torch.zeros(3, 2))
    with pk.use_backend("reference"):
        assert "native: no, the backend asked for is 'reference'" in pk.explain("separable_attention", *arguments())


def run_with(**environment: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import torch, perceiver_kernels as pk\n"
        "pk.separable_attention(torch.zeros(1, 2, 3), [torch.zeros(1, 2, 4)], torch.zeros(1, 4, 3))\n"
        "print(pk.dispatch.current_backend())\n"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def test_the_environment_chooses_too() -> None:
    assert run_with(PERCEIVER_KERNELS_BACKEND="reference").stdout == "reference\n"
    assert "PERCEIVER_KERNELS_BACKEND is 'gpu', must be one of" in run_with(PERCEIVER_KERNELS_BACKEND="gpu").stderr


def test_a_wrong_instruction_set_is_an_error_not_a_slow_surprise() -> None:
    assert "PERCEIVER_KERNELS_CPU_ISA is 'avx51'" in run_with(PERCEIVER_KERNELS_CPU_ISA="avx51").stderr


def test_importing_is_light() -> None:
    """Neither Triton nor torch's compiler is imported before it is needed."""
    code = (
        "import sys, torch; before = set(sys.modules); import perceiver_kernels\n"
        "heavy = {'triton', 'torch._dynamo', 'matplotlib', 'numpy.testing', 'transformers', 'perceiver_pytorch'}\n"
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_gpu_that_a_backend_cannot_use_is_left_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """No code for the GPU, or too little shared memory: asked of calls on a GPU alone, and told."""
    from perceiver_kernels.backends.cuda import runtime
    from perceiver_kernels.ops.separable_query_attention import OP

    cuda = next(entry for entry in dispatch.declarations(OP) if entry.backend == "cuda")
    monkeypatch.setattr(runtime, "emulated", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def reasons(device: str, head_dim: int) -> str:
        return "; ".join(
            cuda.not_supported_reasons(dispatch.Call(OP, device, torch.float32, torch.float32, channels=head_dim))
        )

    monkeypatch.setattr(runtime, "_limits_of", lambda device: (None, 99 << 10))
    assert "shared memory" not in reasons("cuda", 256)
    assert "blocks may need 163840 bytes of shared memory, GPU 0 has 101376" in reasons("cuda", 512)
    assert "shared memory" not in reasons("cpu", 512)
    monkeypatch.setattr(runtime, "_limits_of", lambda device: ("no kernel image", 0))
    assert "no kernel image" in reasons("cuda", 4) and "no kernel image" not in reasons("cpu", 4)
