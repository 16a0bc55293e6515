"""What the commands share in reading their arguments."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class UserError(Exception):
    """What the user gave cannot be used; the message says why in one line."""


def grid_size(text: str) -> tuple[int, int]:
    """Height and width from "HxW"."""
    match = re.fullmatch(r"([1-9]\d{0,5})[x×]([1-9]\d{0,5})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: give HEIGHTxWIDTH in pixels, such as 512x512")
    return int(match[1]), int(match[2])


def byte_size(text: str) -> int:
    """Bytes from "600MB", "8G" or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of memory: give bytes, or such as 600MB or 8GB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def add_memory_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory-limit",
        type=byte_size,
        metavar="BYTES",
        help="leave out what would need more, such as 8GB (default: 60 %% of the memory available)",
    )


def progress() -> Callable[[str], None]:
    """Prints lines to stderr, each with the seconds since the start."""
    start = time.perf_counter()

    def show(line: str) -> None:
        print(f"[{time.perf_counter() - start:5.1f} s] {line}", file=sys.stderr, flush=True)

    return show
