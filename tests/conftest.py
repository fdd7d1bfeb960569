"""The fixtures of whole-system tests: running the command line as a user does."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# How fast a busy machine is, is no property of the code. With SCHEDULES, tests try other examples each time (decision 0010).
settings.register_profile("untimed", deadline=None, derandomize="SCHEDULES" not in os.environ)
settings.load_profile("untimed")

LAUNCH = Path(__file__).parents[1] / "launch.py"


ROOMS = ("common", "ps", "worker", "cluster", "explore")


@pytest.fixture(scope="session")
def links() -> None:
    """Make build/links/roundtable: links to all parts of the package, in the one place where tools look for them."""
    folder = LAUNCH.with_name("build") / "links" / "roundtable"
    folder.mkdir(parents=True, exist_ok=True)
    for part in [*map(LAUNCH.with_name, ROOMS), *LAUNCH.with_name("roundtable").glob("*[!_]")]:
        with contextlib.suppress(FileExistsError):
            (folder / part.name).symlink_to(part)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch computes as a worker does by default: its bits depend on the number of threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`launch(*flags, name="run")` runs `launch.py local` into tmp_path/name and returns its summary; a failure fails."""

    def run(*flags: object, name: str = "run") -> dict[str, Any]:
        command = [sys.executable, str(LAUNCH), "local", "--run-dir", str(tmp_path / name), *map(str, flags)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=tmp_path)
        logs = "".join(f"\n--- {log.name}\n{log.read_text()[-1500:]}" for log in (tmp_path / name).glob("logs/*"))
        assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-2000:]}{logs}"
        return dict(json.loads((tmp_path / name / "summary.json").read_text()))

    return run
