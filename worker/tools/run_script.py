"""Running a training script as a worker of a cluster."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from pathlib import Path

from roundtable.common.config.launching import module_of
from roundtable.common.runtime.errors import UsageError
from roundtable.worker.joining import ADDRESS_VARIABLE, INDEX_VARIABLE


def run_script(coordinator: str, script: str | None, args: list[str], index: int | None) -> None:
    """Run `script` with `args` as Python itself would, as a worker of `coordinator`. None is the built-in example.

    `-m package.module` runs a module. Python looks for modules first in the script's folder, and for a module in the working
    directory. An exception of the script is raised here, after the coordinator was told. Raises UsageError if there is no such
    file or module.
    """
    module = module_of(script) if script is not None else None
    path = Path(script) if script is not None else Path(__file__).with_name("builtin_script.py")
    if module is None and not path.is_file():
        raise UsageError(f"there is no script {path}.")
    os.environ[ADDRESS_VARIABLE] = coordinator
    if index is not None:
        os.environ[INDEX_VARIABLE] = str(index)
    if module is not None:
        _look_first_in(Path.cwd())
        sys.argv = ["-m", *args]
        sys.argv[0] = _file_of(module)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    sys.argv = [str(path), *args]
    _look_first_in(path.resolve().parent if script is not None else Path.cwd())
    runpy.run_path(str(path), run_name="__main__")


def _look_first_in(folder: Path) -> None:
    """Have Python look for modules in `folder` first, and no more beside the file of this command."""
    if not sys.flags.safe_path:
        sys.path[0] = str(folder)


def _file_of(module: str) -> str:
    """Return the file that is run for a module, as `python -m` finds it. Imports the packages that the module is in."""
    try:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{module}.__main__")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # by the package's own code
        spec = None
    if spec is None or spec.origin is None:
        raise UsageError(f"there is no module {module} that can be run: neither in {Path.cwd()} nor where Python finds modules.")
    return spec.origin
