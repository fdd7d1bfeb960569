"""The fixtures of the tests of `explore`: one trained run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from roundtable.cli import cli
from roundtable.cluster.run.exit_codes import run_command
from roundtable.explore.features import Features, default_file, read
from roundtable.explore.trained import Source, Trained, open_run

LAUNCH = Path(__file__).parents[2] / "launch.py"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of LeNet, trained on real digits for two epochs, with the features of its layer relu4."""
    folder = tmp_path_factory.mktemp("explore") / "digits"
    for command in (
        ["local", "--run-dir", folder, "--data", "mnist-5k", "--epochs", 2, "--checkpoint-every", 0.3],
        ["features", folder, "--layer", "relu4", "--workers", 3],
    ):
        done = subprocess.run([sys.executable, LAUNCH, *map(str, command)], capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.fixture(scope="session")
def run(folder: Path) -> Trained:
    return open_run(Source(str(folder)))


@pytest.fixture(scope="session")
def features(run: Trained) -> Features:
    """The features that the workers have computed: of the layer relu4, which is module 10."""
    found = read(default_file(run, "10"), run, "10")
    assert found is not None
    return found


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refusal(*argv)` gives the sentence with which launch.py refuses a command, checked to be one."""

    def refuse(*argv: object) -> str:
        assert run_command(cli, [str(arg) for arg in argv], "launch.py") == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ") and text.endswith(".\n") and text.count("\n") == 1, text
        return text

    return refuse
