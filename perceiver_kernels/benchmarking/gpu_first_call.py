"""What the first calls of a fresh process take, with and without compiled kernels kept on disk."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable

# Run by `python -c`, so that even torch's import is on the clock; an argument "tiny" stands for the interpreter.
PROGRAM = """
import time
start = time.perf_counter()
import torch
torch_imported = time.perf_counter()
import perceiver_kernels
imported = time.perf_counter()
from perceiver_kernels.benchmarking import gpu_first_call
gpu_first_call.main({"import torch": torch_imported - start, "import perceiver_kernels": imported - torch_imported})
"""


def command(tiny: bool) -> list[str]:
    """The program's command line."""
    return [sys.executable, "-c", PROGRAM, *(["tiny"] if tiny else [])]


def main(seconds: dict[str, float]) -> None:
    """Prints the given seconds and those of an encoder cross-attention's first and second calls, as JSON."""
    import torch

    from perceiver_kernels.benchmarking import gpu_cases
    from perceiver_kernels.benchmarking.compare import prepare
    from perceiver_kernels.benchmarking.interpreted import interpreted
    from perceiver_kernels.benchmarking.measure import synchronize
    from perceiver_kernels.benchmarking.providers import PROVIDERS

    tiny = "tiny" in sys.argv[1:]
    device = "cpu" if tiny else "cuda"
    case = (gpu_cases.tiny() if tiny else gpu_cases.full()).first_call
    image = case.image().to(device)

    def timed(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - start

    square = torch.ones(64, 64, device=device)
    seconds["a product, first call"] = timed(lambda: square @ square)  # the GPU's context and its products' library
    with interpreted() if tiny else contextlib.nullcontext():
        for mode in ("forward", "forward+backward"):
            run = prepare(PROVIDERS["ours"], case, mode, image)
            seconds |= {f"{mode}, {which} call": timed(run) for which in ("first", "second")}
    print(json.dumps(seconds))
