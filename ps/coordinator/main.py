"""Starts a coordinator: for a new run, in place of a coordinator that has died, or to resume a run from a checkpoint."""

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
from roundtable.ps.coordinator.ending.farewell import RestartRun
from roundtable.ps.coordinator.recovery import RestoredRun, restore

log = logging.getLogger("roundtable.ps.coordinator")

T = TypeVar("T")

#: Seconds to wait for the old coordinator's address to become free.
_REBIND_S = 5.0
#: Seconds for servers and workers of a finished run, which were started again, to hear that it has finished. They may be slow to
#: start on a busy machine. The wait ends when all have heard.
_LATE_S = 60.0


def serve(
    settings: Settings,
    bind: str,
    run_dir: Path,
    how: How = "begin",
    accept_versions: bool = False,
    signals: Sequence[signal.Signals] = (),
) -> None:
    """Coordinate one run, listening at `bind`. Return when the run has finished and its results are written.

    The event log and the results are in `run_dir`. `how` says whether to begin, recover or resume a run there. A checkpoint of
    another version of this program or of torch is resumed from only if `accept_versions` is True.

    A coordinator that recovers a run takes the port of the one before it, if `bind` leaves the port open. The coordinator writes
    its address to run_dir/address. The first of `signals` stops the run after a checkpoint, the second one at once.

    Raises UsageError if it cannot listen, read or write. Raises ClusterError, which names the process and the reason, if the run
    fails. Raises Stopped if one of `signals` has come.
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
            if how == "resume":  # the run may have finished before, and go on for longer now
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
    """Return the run in `run_dir`, rolled back to its newest checkpoint, and a warning about other versions, '' if none.

    Files of later checkpoints are removed. Raises UsageError if there is no run. Unless `accept_versions` is True, also raises
    UsageError if the checkpoint is of other versions.
    """
    found, problems = newest(run_dir)
    warning = check_versions(found, accept_versions) if found is not None else ""
    for problem in problems:
        log.warning("a checkpoint is not used: %s", problem)
    for folder in folders(run_dir):
        if found is None or folder > found.folder:
            remove(folder)
    upto = found.manifest.round if found is not None else 0
    restored = restore(run_dir / FILE_NAME, upto, has_finished=(run_dir / SUMMARY_FILE).exists())
    if restored is None:
        raise UsageError(f"there is no run in {run_dir} to go on with.")
    return restored, warning


def run_to_recover(run_dir: Path) -> RestoredRun | None:
    """Return the run whose coordinator has died, or None if there is none. Remove its unfinished checkpoints."""
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
    """Return `bind` with the old coordinator's port from `file`, if `bind` names no port."""
    if not bind.endswith(":0") or not file.exists():
        return bind
    return f"{bind.removesuffix(':0')}:{file.read_text(encoding='utf-8').strip().rpartition(':')[2]}"


def _listen(context: zmq.Context[Any], bind: str, patience_s: float) -> tuple[zmq.Socket[bytes], str]:
    """Return a socket at `bind` and its address. Retry for `patience_s` seconds: a process that has just died may hold the port.

    Raises UsageError if that fails.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return router(context, bind)
        except UsageError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(TICK_MS / 1000)


def _meanwhile(sock: zmq.Socket[bytes], work: Callable[[], T]) -> T:
    """Run `work` on another thread and return its result. Meanwhile tell processes that ask to join to wait."""
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
