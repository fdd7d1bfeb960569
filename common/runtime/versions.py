"""Which versions of this program and of torch compute: equal bits need equal ones."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import msgspec

_PROGRAM = "roundtable-ps"
_PROJECT_FILE = Path(__file__).resolve().parents[2] / "pyproject.toml"


class Versions(msgspec.Struct, frozen=True):
    """That of the program and that of torch, as far as somebody has put them down."""

    program: str = "unknown"
    torch: str = "unknown"

    def __str__(self) -> str:
        return f"roundtable {self.program} with torch {self.torch}"


def versions_here() -> Versions:
    """Those of this process, which need not import torch."""
    return Versions(_of_sources() or _installed(_PROGRAM), _installed("torch"))


def _of_sources() -> str:
    """The program's version where it runs from its sources, which may be newer than what was installed; else ''."""
    try:
        project = tomllib.loads(_PROJECT_FILE.read_text(encoding="utf-8"))["project"]
    except (OSError, KeyError, ValueError):
        return ""
    return str(project["version"]) if project.get("name") == _PROGRAM else ""


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"
