"""The rules of the rooms: which may import which, that there are no cycles, and that a process loads only what it needs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("common", "ps", "worker", "cluster", "explore")


def files_of(*rooms: str) -> list[Path]:
    files = [file for room in rooms for file in sorted((ROOT / room).rglob("*.py"))]
    assert files
    return files


def module_of(file: Path) -> str:
    return ".".join(["roundtable", *file.relative_to(ROOT).with_suffix("").parts])


@pytest.mark.usefixtures("links")
def test_rooms_import_only_what_they_may() -> None:
    """Hold the contracts of pyproject.toml, which also forbid cycles."""
    lint = Path(sys.executable).with_name("lint-imports")
    command = [lint, "--no-cache", ROOT / "pyproject.toml"]
    result = subprocess.run(command, cwd=ROOT / "build" / "links", capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_folder_has_more_than_ten_modules() -> None:
    folders = {file.parent for file in files_of(*ROOMS, "benchmarks")}
    folders.remove(ROOT / "common" / "codecs")  # which has one for each codec
    many = {str(folder.relative_to(ROOT)): len([*folder.glob("[!_]*.py")]) for folder in folders}
    assert {folder: number for folder, number in many.items() if number > 10} == {}


def test_no_file_has_more_than_400_lines_and_no_class_more_than_300() -> None:
    files = files_of(*ROOMS, "benchmarks", "roundtable")
    assert {str(file.relative_to(ROOT)) for file in files if len(file.read_text().splitlines()) > 400} == set()
    classes = [(file, node) for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef)]
    sizes = {f"{file.relative_to(ROOT)}: {node.name}": (node.end_lineno or 0) - node.lineno + 1 for file, node in classes}
    assert {name: size for name, size in sizes.items() if size > 300} == {}


def test_cluster_never_imports_torch() -> None:
    assert [str(file) for file in files_of("cluster") if re.search(r"^\s*(import|from) torch\b", file.read_text(), re.M)] == []


def test_the_orphan_reaper_needs_only_the_standard_library() -> None:
    text = (ROOT / "cluster" / "process" / "orphan_reaper.py").read_text()
    names = re.findall(r"^\s*(?:import|from) (\w+)", text, re.M)
    assert names and set(names) <= {"__future__", *sys.stdlib_module_names}


def loaded_by(statement: str) -> set[str]:
    """The packages, and of ours the rooms, that a new process has loaded after `statement`."""
    code = f"import sys; {statement}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.removeprefix("roundtable.").partition(".")[0] for name in result.stdout.split()}


def test_the_command_line_loads_no_torch_and_no_other_heavy_thing() -> None:
    loaded = loaded_by("import roundtable.cli")
    assert not loaded & {"torch", "numpy", "matplotlib", "rich", "zmq", "ps", "explore"}
    assert "cluster" in loaded


def test_cluster_as_a_whole_loads_no_torch_and_no_other_process() -> None:
    names = ", ".join(module_of(file) for file in files_of("cluster") if file.name != "__init__.py")
    assert not loaded_by(f"import {names}") & {"torch", "ps", "explore"}


def test_the_coordinator_needs_no_torch() -> None:
    assert "torch" not in loaded_by("import roundtable.ps.coordinator.main")


def test_a_script_may_import_roundtable_before_it_joins_without_loading_torch_or_cluster() -> None:
    assert not loaded_by("import roundtable") & {"torch", "cluster"}


def test_all_that_is_public_can_be_had() -> None:
    code = "import roundtable; [getattr(roundtable, name) for name in roundtable.__all__]; roundtable.nothing"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stderr.splitlines()[-1] == "AttributeError: module 'roundtable' has no attribute 'nothing'"


def test_only_those_who_start_processes_end_any() -> None:
    """A process id that came in a message may be anybody's: `ps` and `worker` have nothing to kill with."""
    ends = re.compile(r"\b(?:os\.(?:kill|killpg)|pidfd_send_signal)\b|\.(?:kill|terminate|send_signal)\(")
    found = [str(file.relative_to(ROOT)) for file in files_of("common", "ps", "worker") if ends.search(file.read_text())]
    assert sorted(found) == ["common/runtime/failpoints.py", "common/runtime/restart.py"]  # itself, and its own children
