"""The command `checkpoint`: lists, checks and exports the checkpoints of a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from roundtable.cluster.run.console import say
from roundtable.common.runtime.errors import ClusterError, UsageError
from roundtable.common.storage import checkpoint
from roundtable.common.storage.checkpoint import MANIFEST_FILE, Checkpoint
from roundtable.common.storage.run_files import find_run


def list_checkpoints(run: str) -> None:
    """Print a line for each checkpoint. Raises UsageError if there is no such run, or if it has no checkpoint."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("round", "servers", "MB", "written", "roundtable", "torch"):
        table.add_column(title, justify="right" if title in ("round", "servers", "MB") else "left", no_wrap=True)
    table.add_column("folder", overflow="fold")
    for saved in _all(find_run(run)):
        manifest = saved.manifest
        size = sum(entry.bytes for entry in manifest.files.values())
        written = time.localtime((saved.folder / MANIFEST_FILE).stat().st_mtime)
        table.add_row(
            str(manifest.round), str(manifest.servers), f"{size / 1e6:.1f}", time.strftime("%Y-%m-%d %H:%M:%S", written),
            manifest.versions.program, manifest.versions.torch, str(saved.folder),
        )  # fmt: skip
    Console(soft_wrap=True).print(table)


def verify_checkpoints(run: str, hindrance: Callable[[Checkpoint], str]) -> None:
    """Print for each checkpoint whether it is good, its files are damaged, or `hindrance` finds that it cannot be restored.

    Raises ClusterError if a checkpoint cannot be used, or UsageError if there is none.
    """
    console, damaged = Console(), 0
    for saved in _all(find_run(run)):
        damage = saved.damage() or hindrance(saved)
        damaged += bool(damage)
        say(console, f"{saved.folder}: {damage or f'good, of {saved.manifest.versions}'}")
    if damaged:
        raise ClusterError(f"{damaged} of the checkpoints in {run} cannot be used.")


def export_model(run: str, round_: int | None, out: Path) -> None:
    """Write the model's parameters and buffers at `round_` to a safetensors file. None is the newest whole checkpoint.

    Raises UsageError if there is no such checkpoint or the file cannot be written, or ClusterError if it is damaged.
    """
    folder = find_run(run)
    if round_ is None:
        found, problems = checkpoint.newest(folder)
        if found is None:
            raise UsageError(f"the run in {folder} has no whole checkpoint. {' '.join(problems)}".rstrip())
    else:
        found = next((s for s in _all(folder) if s.manifest.round == round_), None)
        if found is None:
            rounds = ", ".join(str(saved.manifest.round) for saved in _all(folder))
            raise UsageError(f"the run in {folder} has no checkpoint of round {round_}; it has {rounds}.")
        if damage := found.damage():
            raise ClusterError(damage)
    from roundtable.common.storage.model_file import write_model

    try:
        write_model(found, out)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror or error}.") from None
    say(Console(), f"the model of round {found.manifest.round} is in {out}")


def _all(folder: Path) -> list[Checkpoint]:
    finished = checkpoint.finished(folder)
    if not finished:
        raise UsageError(f"the run in {folder} has no checkpoints; --checkpoint-every sets how often one is made.")
    return [checkpoint.read(path) for path in finished]
