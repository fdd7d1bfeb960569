"""The fixtures of the tests of `cluster`: starting launchers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launched import Launched


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """`start(*argv, NAME=value)` starts a Python program in tmp_path with these environment variables."""
    launched: list[Launched] = []

    def begin(*argv: object, **env: str) -> Launched:
        launched.append(Launched([sys.executable, *argv], tmp_path, env))
        return launched[-1]

    yield begin
    for one in launched:
        one.close()


@pytest.fixture
def stub(start: Callable[..., Launched], tmp_path: Path) -> Callable[..., Launched]:
    """`stub(worker_1="exit 3")` starts a launcher of stubs in tmp_path/run; see stub_program.py."""
    (tmp_path / "run").mkdir()

    def begin(**actions: Any) -> Launched:
        env = {f"STUB_{name.upper()}": action for name, action in actions.items()}
        return start(Path(__file__).with_name("stub_program.py"), "local", tmp_path / "run", **env)

    return begin
