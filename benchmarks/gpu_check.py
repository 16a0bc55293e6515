"""python benchmarks/gpu_check.py: everything a machine with an NVIDIA GPU can show of this library, in eight minutes.

Needs torch, triton and this checkout, nothing else. Writes a JSON report and its tables to --out, by default
benchmarks/results. Without a GPU it runs through at tiny sizes, in Triton's interpreter.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from perceiver_kernels.benchmarking.gpu_check import main

if __name__ == "__main__":
    raise SystemExit(main())
