"""python -m perceiver_kernels COMMAND: the way in to the command line."""

from perceiver_kernels.cli import main

raise SystemExit(main())
