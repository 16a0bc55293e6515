"""python benchmarks/run.py: `python -m perceiver_kernels bench`, its figures kept in benchmarks/results.

Takes the same arguments; `--bars` reproduces the table of the README, `all` measures every published shape.
"""

import sys
import time
from pathlib import Path

from perceiver_kernels.cli import main

RESULTS = Path(__file__).parent / "results"

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not {"--json", "-h", "--help"} & set(arguments):
        kind = "bars" if "--bars" in arguments else "cases"
        arguments += ["--json", str(RESULTS / f"{kind}-{time.strftime('%Y-%m-%d-%H%M%S')}.json")]
    raise SystemExit(main(["bench", *arguments]))
