"""Starting a coordinator: at a run's beginning, in place of one that has died, or to go on from a checkpoint."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import zmq

from roundtable.common.config.settings import Settings, flat
from roundtable.common.network.addresses import advertised
from roundtable.common.protocol.messages.session import Heartbeat
from roundtable.common.protocol.transport import Stamp, allow_files, receive, router, send, write_address
from roundtable.common.runtime.errors import UsageError, WireError
from roundtable.common.runtime.restart import restart
from roundtable.common.runtime.signal_handlers import handled
from roundtable.common.storage.checkpoint import check_versions, finished, folders, newest, remove
from roundtable.common.storage.event_log import FILE_NAME
from roundtable.common.storage.private_files import make_run_dir
from roundtable.common.storage.run_files import MODEL_FILE, SETTINGS_FILE, SUMMARY_FILE, How
from roundtable.ps.coordinator.coordinator import TICK_MS, Coordinator
from roundtable.ps.coordinator.farewell import RestartRun
from roundtable.ps.coordinator.recovery import RestoredRun, restore

log = logging.getLogger("roundtable.ps.coordinator")

T = TypeVar("T")

#: Seconds for the old address of a coordinator to become free.
_REBIND_S = 5.0
#: Seconds for all servers and workers to hear that the run has finished, which were started as if it had not: on a busy machine
#: it takes them long to start. Once all have heard, nobody waits.
_LATE_S = 60.0


def serve(
    settings: Settings,
    bind: str,
    run_dir: Path,
    how: How = "begin",
    accept_versions: bool = False,
    signals: Sequence[signal.Signals] = (),
) -> None:
    """Coordinate one run, listening at `bind`, with its event log and results in `run_dir`. `how` says what is done with what is
    there. The newest checkpoint to resume from may be of another version of this program or of torch only if `accept_versions`.

    One that recovers a run is at the address of the coordinator before it, if `bind` leaves the port open. Writes the address it
    listens at to run_dir/address. Returns when the run has finished and its results are written.
    The first of `signals` that comes has it stop, with a checkpoint, and a second one at once. Raises UsageError where it cannot
    listen, read or write, ClusterError where the run failed, naming who and why, and Stopped where one of `signals` has come.
    """
    allow_files(settings.workers + settings.servers)
    restored, warning = None, ""
    if how in ("recover", "nothing") and (restored := run_to_recover(run_dir)) is not None:
        if restored.stop is None:
            _check_same(settings, restored, run_dir)
        bind = _address_of_old(bind, run_dir / "address")
    context: zmq.Context[Any] = zmq.Context()
    try:
        sock, bound = _listen(context, bind, _REBIND_S if how != "begin" else 0.0)
        if how == "resume":
            restored, warning = _meanwhile(sock, lambda: run_to_resume(run_dir, accept_versions))
        try:
            make_run_dir(run_dir)
            patience_s = _LATE_S if how == "nothing" else None
            coordinator = Coordinator(sock, settings, run_dir, restored, recovers=how != "resume", late_s=patience_s)
            if how == "resume":  # of a run that had finished, and is to go on for longer
                for name in (SUMMARY_FILE, MODEL_FILE):
                    (run_dir / name).unlink(missing_ok=True)
            address = advertised(bound, "tcp://127.0.0.1:1")
            write_address(run_dir / "address", address)
            if warning:
                coordinator.context.journal.warn(warning)
        except OSError as error:
            raise UsageError(f"the run directory {run_dir} cannot be written: {error.strerror or error}.") from None
        log.info("listening at %s", address if address == bound else f"{bound}; others find it at {address}")
        with handled(signals, coordinator.stopping.request):
            coordinator.run()
    except RestartRun:
        context.destroy(linger=1000)
        resumes = ("--config", str(run_dir / SETTINGS_FILE), "--run-dir", str(run_dir), "--listen", bound, "--resume", "auto")
        restart([*resumes, *["--allow-version-mismatch"] * accept_versions])
    finally:
        context.destroy(linger=1000)


def run_to_resume(run_dir: Path, accept_versions: bool = False) -> tuple[RestoredRun, str]:
    """A run that goes on from its newest checkpoint, put back to there, and a warning of other versions, '' if none.

    What was begun after it is removed. Raises UsageError if there is no run, or one of other versions."""
    found, problems = newest(run_dir)
    warning = check_versions(found, accept_versions) if found is not None else ""
    for problem in problems:
        log.warning("a checkpoint is not used: %s", problem)
    for folder in folders(run_dir):
        if found is None or folder > found.folder:
            remove(folder)
    restored = restore(run_dir / FILE_NAME, upto=found.manifest.round if found is not None else 0)
    if restored is None:
        raise UsageError(f"there is no run in {run_dir} to go on with.")
    return restored, warning


def run_to_recover(run_dir: Path) -> RestoredRun | None:
    """A run whose coordinator has died, if there is one. Checkpoints that were under way are removed."""
    restored = restore(run_dir / FILE_NAME)
    if restored is not None:
        for folder in set(folders(run_dir)) - set(finished(run_dir)):
            remove(folder)
    return restored


def _check_same(settings: Settings, restored: RestoredRun, run_dir: Path) -> None:
    values = flat(settings)
    for name, was in flat(restored.head.settings).items():
        asked = values[name]
        if asked != was and restored.tables:
            raise UsageError(f"the run in {run_dir} has {name} = {was} and not {asked}: it goes on with the same settings only.")


def _address_of_old(bind: str, file: Path) -> str:
    """`bind` with the port that the others know, if it names none."""
    if not bind.endswith(":0") or not file.exists():
        return bind
    return f"{bind.removesuffix(':0')}:{file.read_text(encoding='utf-8').strip().rpartition(':')[2]}"


def _listen(context: zmq.Context[Any], bind: str, patience_s: float) -> tuple[zmq.Socket[bytes], str]:
    """A socket at `bind`, which may be in use for a moment yet by a process that has just died."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return router(context, bind)
        except UsageError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(TICK_MS / 1000)


def _meanwhile(sock: zmq.Socket[bytes], work: Callable[[], T]) -> T:
    """Return what `work` returns on another thread. Tell processes to wait that ask to join meanwhile."""
    stamp = Stamp(sender="coordinator")
    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(work)
        while not result.done():
            sock.poll(TICK_MS)
            with contextlib.suppress(WireError):
                frames = receive(sock)
                if frames is not None and len(frames) > 1 and stamp.open(frames[1].buffer).read_hello():
                    send(sock, stamp.encode(Heartbeat()), to=frames[0].bytes)
    return result.result()
