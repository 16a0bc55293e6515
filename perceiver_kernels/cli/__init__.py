"""The command line: picks a command and runs it; each command is a module of this package."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from perceiver_kernels.cli.arguments import UserError

COMMANDS = {
    "demo": "one Perceiver on every pixel of a photograph, by each provider: a table and a picture",
    "bench": "this machine's table: time, memory, error, against every peer installed",
    "env": "what was built, what was found, what will run",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 2 where what the user gave cannot be used."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print(f"no command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    # Imported only now: a command that cannot be imported must not keep `env` from saying why.
    command = importlib.import_module(f"perceiver_kernels.cli.{name}")
    parser = argparse.ArgumentParser(prog=f"python -m perceiver_kernels {name}", description=COMMANDS[name])
    command.add_arguments(parser)
    try:
        return command.run(parser.parse_args(rest))
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def usage() -> str:
    commands = "\n".join(f"  {name:6} {what}" for name, what in COMMANDS.items())
    return f"usage: python -m perceiver_kernels COMMAND ...\n\n{commands}\n\nEach command explains itself with --help."
