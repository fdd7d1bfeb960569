"""The versions of this program and of torch: equal bits need equal versions."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import msgspec

_PROGRAM = "roundtable-ps"
_PROJECT_FILE = Path(__file__).resolve().parents[2] / "pyproject.toml"


class Versions(msgspec.Struct, frozen=True):
    """The version of the program and that of torch, as far as they are known."""

    program: str = "unknown"
    torch: str = "unknown"

    def __str__(self) -> str:
        return f"roundtable {self.program} with torch {self.torch}"


def versions_here() -> Versions:
    """Return the versions of this process, without importing torch."""
    return Versions(_of_sources() or _installed(_PROGRAM), _installed("torch"))


def _of_sources() -> str:
    """Return the program's version if it runs from its sources, else ''. Sources may be newer than the installed version."""
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
