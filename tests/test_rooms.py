"""The rules of the rooms: which package may import which, and that the command line loads nothing before it is needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("common", "ps", "worker", "cluster", "explore", "launch")
#: What each room may import of ours besides itself.
ALLOWED: dict[str, set[str]] = {
    "common": set(),
    "ps": {"common"},
    "worker": {"common"},
    "cluster": {"common"},
    "explore": {"common", "worker"},
}


@dataclass(frozen=True)
class Import:
    """One import statement: the package's first name, and the functions around it."""

    package: str
    file: Path
    line: int
    inside: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.package}"


def imports_of(file: Path) -> list[Import]:
    def walk(node: ast.AST, inside: tuple[str, ...]) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name.partition(".")[0], file, node.lineno, inside)
        elif isinstance(node, ast.ImportFrom):
            package = file.parent.name if node.level else (node.module or "").partition(".")[0]
            yield Import(package, file, node.lineno, inside)
        for child in ast.iter_child_nodes(node):
            deeper = (*inside, node.name) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else inside
            yield from walk(child, deeper)

    return list(walk(ast.parse(file.read_text(encoding="utf-8")), ()))


def imports_in(room: str) -> list[Import]:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    return [one for file in files for one in imports_of(file)]


def is_alone_mode(one: Import) -> bool:
    """The one exception: a script that runs alone has `cluster` start a coordinator and a server for it."""
    return one.package == "cluster" and one.file == ROOT / "worker" / "__init__.py" and one.inside == ("join",)


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_the_rooms_it_may(room: str) -> None:
    forbidden = set(OURS) - ALLOWED[room] - {room}
    assert [str(one) for one in imports_in(room) if one.package in forbidden and not is_alone_mode(one)] == []


def test_only_join_makes_a_worker_call_cluster() -> None:
    assert len([one for one in imports_in("worker") if one.package == "cluster"]) == 1


def test_cluster_never_imports_torch() -> None:
    assert [str(one) for one in imports_in("cluster") if one.package == "torch"] == []


def test_the_guard_needs_only_the_standard_library() -> None:
    for one in imports_of(ROOT / "cluster" / "guard.py"):
        assert one.package == "__future__" or one.package in sys.stdlib_module_names, str(one)


def test_launch_imports_ps_and_worker_inside_its_commands() -> None:
    rooms = [one for one in imports_of(ROOT / "launch.py") if one.package in ("ps", "worker", "explore", "torch")]
    assert rooms
    assert [str(one) for one in rooms if not one.inside] == []


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in result.stdout.split()}


def test_importing_launch_loads_no_torch_and_no_other_heavy_thing() -> None:
    assert not loaded_by("import launch") & {"torch", "numpy", "matplotlib", "rich", "zmq", "ps", "worker", "explore"}


def test_cluster_as_a_whole_loads_no_torch_and_no_other_process() -> None:
    names = ", ".join(f"cluster.{file.stem}" for file in sorted((ROOT / "cluster").glob("[!_]*.py")))
    assert not loaded_by(f"import {names}") & {"torch", "ps", "worker", "explore"}


def test_the_coordinator_needs_no_torch() -> None:
    assert "torch" not in loaded_by("import ps.serving")


def test_a_script_may_import_worker_before_it_joins_without_loading_torch_or_cluster() -> None:
    assert not loaded_by("import worker") & {"torch", "cluster"}


def test_the_checker_sees_imports_at_any_depth(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("if True:\n    import a.b\ndef f():\n    class C:\n        from c import d\nfrom . import e\n")
    found = [(one.package, one.inside) for one in imports_of(file)]
    assert found == [("a", ()), ("c", ("f",)), (tmp_path.name, ())]


def test_only_those_who_start_processes_end_any() -> None:
    """A process id that came in a message may be anybody's: `ps` and `worker` have nothing to kill with."""
    ends = re.compile(r"\b(?:os\.(?:kill|killpg)|pidfd_send_signal)\b|\.(?:kill|terminate|send_signal)\(")
    found = [
        str(file.relative_to(ROOT))
        for room in ("common", "ps", "worker")
        for file in (ROOT / room).rglob("*.py")
        if ends.search(file.read_text())
    ]
    assert sorted(found) == ["common/runtime/failpoints.py", "common/runtime/restart.py"]  # itself, and its own children
