"""Whatever the test extra installs on this platform is installed: where a package is missing, its tests are skipped."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

from packaging.requirements import Requirement


def extra(name: str) -> list[Requirement]:
    """The requirements of an extra on this platform."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    (listed,) = re.findall(rf"^{name} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    required = [Requirement(entry) for entry in re.findall(r'"([^"]+)"', listed)]
    return [entry for entry in required if entry.marker is None or entry.marker.evaluate()]


def installed(name: str) -> bool:
    return any(importlib.metadata.distributions(name=name))


def test_the_test_extra_is_installed() -> None:
    required = [*extra("test"), *extra("demo")]
    names = [entry.name for entry in required if entry.name != "perceiver_kernels"]
    assert {"pytest", "hypothesis", "perceiver-pytorch"} <= set(names)
    assert [name for name in names if not installed(name)] == []
