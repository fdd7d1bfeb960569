"""The fixtures of the tests of recovery: starting runs, and the result of one that nothing disturbs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from benchmarks.live import TRAINING, Cluster

Start = Callable[..., Cluster]


def starting(tmp_path: Path, flag: str) -> Iterator[Start]:
    """A function that starts a run whose folder in tmp_path is given with `flag`. What it has started is stopped at the end."""
    started: list[Cluster] = []

    def start(*flags: object, name: str = "run", env: Mapping[str, str] | None = None) -> Cluster:
        started.append(Cluster(tmp_path / name, flag, tmp_path / name, *flags, env=env))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Start]:
    """`cluster(*flags, name="run", env=None)` starts a run in tmp_path/name; `env` is added to the environment."""
    yield from starting(tmp_path, "--run-dir")


@pytest.fixture
def resumed(tmp_path: Path) -> Iterator[Start]:
    """`resumed(*flags, name="run")` has the run in tmp_path/name go on."""
    yield from starting(tmp_path, "--resume")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights_sha256 of TRAINING that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return str(Cluster(folder, "--run-dir", folder, *TRAINING).summary()["weights_sha256"])
