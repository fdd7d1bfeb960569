"""Start the coordinator and the servers of a run on this machine."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from roundtable.cluster.process.children import Child, Processes
from roundtable.cluster.run.run_directory import ADDRESS_FILE
from roundtable.common.config.settings import START_S
from roundtable.common.runtime.errors import ClusterError
from roundtable.common.storage import checkpoint
from roundtable.common.storage.run_files import SETTINGS_FILE, How

log = logging.getLogger("roundtable.cluster.local")

#: Seconds between two lines that say what the launcher waits for.
_TELL_S = 10.0
#: The fewest bytes of checkpoints that a coordinator checks in a second, before it listens.
_CHECKED_PER_S = 20e6


def start_coordinator(
    processes: Processes,
    program: Sequence[str],
    folder: Path,
    port: int,
    tick: Callable[[], None],
    how: How = "begin",
    flags: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    start_s: float = START_S,
    say: Callable[[str], None] = log.info,
) -> str:
    """Start the coordinator of the run in `folder`, and return its address once it listens.

    The settings file is in `folder`. `flags` beat it. `env` is added to the coordinator's environment.

    Calls `tick` again and again, which waits a moment and may raise. Says by `say` what the launcher waits for. Raises
    ClusterError if the coordinator does not listen within `start_s` seconds, plus the time to check the checkpoints.
    """
    command = ["coordinator", "--config", str(folder / SETTINGS_FILE), "--run-dir", str(folder), *flags]
    bind = ["--listen", f"tcp://127.0.0.1:{port}"]
    child = processes.start("coordinator", [*program, *prepared(command, how), *bind], **threads(1), **(env or {}))
    patience_s = start_s + (checkpoint.size(folder) / _CHECKED_PER_S if how == "resume" else 0.0)
    told_at = time.monotonic()
    deadline = told_at + patience_s
    while not (folder / ADDRESS_FILE).exists():
        tick()
        if time.monotonic() > told_at + _TELL_S:
            told_at = time.monotonic()
            say("waiting for the coordinator to listen.")
        if not processes.running("coordinator") and not (folder / ADDRESS_FILE).exists():
            raise ClusterError(f"the coordinator ended at once; its log is {child.log}.")
        if time.monotonic() > deadline:
            raise ClusterError(f"the coordinator does not listen after {patience_s:.0f} s; its log is {child.log}.")
    address = (folder / ADDRESS_FILE).read_text(encoding="utf-8").strip()
    child.resume_command = prepared(child.command, "resume", f"--listen={address}")
    return address


def start_server(
    processes: Processes,
    program: Sequence[str],
    address: str,
    index: int | None,
    device: str = "cpu",
    bind: str = "tcp://127.0.0.1:0",
    flags: Sequence[str] = (),
    **env: str,
) -> Child:
    """Start a server of the run whose coordinator is at `address`, and return it. `index` None: any free number."""
    number = [] if index is None else ["--index", str(index)]
    command = ["server", "--coordinator", address, "--listen", bind, *number, "--server-device", device, *flags]
    return processes.start("server" if index is None else f"server-{index}", [*program, *command], **threads(1), **env)


def trusting(folder: str | Path) -> list[str]:
    """Return the flags with which a server runs any optimizer class, also of modules in `folder`: that of the script."""
    return ["--trust-optimizers=*", f"--trust-optimizers={Path(folder).resolve()}{os.sep}"]


def prepared(command: Sequence[str], how: How, *more: str) -> list[str]:
    """Return a coordinator's command in which `--prepared` is `how`, with `more` flags."""
    return [*(word for word in command if not word.startswith("--prepared")), f"--prepared={how}", *more]


def threads(count: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}
