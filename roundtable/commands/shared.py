"""Functions that several commands share: their log, the program's command line, and runs of their own."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import click

import roundtable
from roundtable.common.config.settings import Settings
from roundtable.common.runtime.errors import OneLine
from roundtable.common.storage.run_files import RUNS, is_run


def program() -> list[str]:
    """Return the command line of this program, to which the names of commands are added."""
    return [sys.executable, str(Path(roundtable.__file__).with_name("cli.py"))]


def log_to_stderr(quiet: bool) -> None:
    """Show on stderr what our packages log. `quiet`: warnings and errors only. Leave a script's own logging alone."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("roundtable")
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False


def complete_runs(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of runs, for a shell that completes an argument."""
    return [path.name for path in sorted(RUNS.glob(f"{incomplete}*")) if is_run(path)]


def on_cluster(folder: Path, settings: Settings, script: str, args: tuple[str, ...]) -> None:
    """Run a script on a cluster of this machine, as a part of another command. `folder` is the run directory."""
    from rich.console import Console

    from roundtable.cluster.launch.local import LaunchSpec, run_local
    from roundtable.cluster.run.console import LiveOnly
    from roundtable.common.storage.event_log import FILE_NAME

    run_local(LaunchSpec(settings, folder, script, args), program(), os.environ, LiveOnly(Console(), folder / FILE_NAME))
