"""The cluster of a script that was started by itself: it gets a coordinator and a server of its own."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import roundtable
from roundtable.cluster.launch.starting import start_coordinator, start_server
from roundtable.cluster.options.resume import stop_message
from roundtable.cluster.process.children import GATHER_S, TICK_S, Processes, root_cause
from roundtable.cluster.run.run_directory import LOGS, claim, read_summary, tidy_log, write_settings
from roundtable.cluster.run.summary import summary_lines
from roundtable.common.config.settings import Settings
from roundtable.common.runtime.errors import ClusterError, PsError
from roundtable.common.storage.run_files import SETTINGS_FILE

#: Seconds for the coordinator and the server to end after the worker.
_END_S = 10.0
#: Flags of the coordinator. No other worker could take over, and this one may pause, as by Ctrl-Z, so it never counts as lost.
_FLAGS = ("--heartbeat-timeout", "1e6")
_LAUNCH = Path(roundtable.__file__).with_name("cli.py")


def start_companions(script: str, was_stopped: Callable[[], int] = lambda: 0) -> str:
    """Start a coordinator and a server for this process, the one worker of a run, and return the coordinator's address.

    The run is kept in runs/<name of the script>. The coordinator and the server end with this process. The results are then
    printed on stderr. If a signal has told the worker to stop, the command that resumes the run is printed instead.
    `was_stopped` returns the number of that signal, or 0.
    Raises UsageError if the run directory cannot be used, or ClusterError if the coordinator or the server does not start.
    """
    cleanup = ExitStack()
    try:
        folder, _ = cleanup.enter_context(claim(None, Path(script).stem or "run", overwrite=False))
        write_settings(folder / SETTINGS_FILE, Settings(workers=1, servers=1), script, sys.argv[1:])
        cleanup.callback(tidy_log, folder)
        processes = cleanup.enter_context(Processes(folder / LOGS, os.environ))
        program = [sys.executable, str(_LAUNCH)]

        def tick() -> None:
            time.sleep(TICK_S)
            processes.poll()
            for child in processes.failures():
                raise ClusterError(child.describe_end())

        address = start_coordinator(processes, program, folder, 0, tick, flags=_FLAGS)
        start_server(processes, program, address, 0)
    except OSError as error:
        cleanup.close()
        raise ClusterError(f"the coordinator and server of this script cannot be started: {error.strerror or error}.") from None
    except BaseException:
        cleanup.close()
        raise
    atexit.register(_end, cleanup, processes, folder, was_stopped)
    return address


def _end(cleanup: ExitStack, processes: Processes, folder: Path, was_stopped: Callable[[], int]) -> None:
    """Wait for the coordinator and the server, and print the results. Called when the worker has left the run."""
    with cleanup:
        if number := was_stopped():
            for child in processes.running("coordinator"):  # it has made a checkpoint, and lets the worker leave
                os.kill(child.popen.pid, signal.SIGINT)
        deadline = time.monotonic() + _END_S
        while processes.running() and time.monotonic() < deadline:
            time.sleep(TICK_S)
            processes.poll()
            if processes.failures():  # the other process may say why in a moment
                deadline = min(deadline, time.monotonic() + GATHER_S)
        why = root_cause(failures).describe_end() if (failures := processes.failures()) else f"its logs are in {folder / LOGS}."
    if number:
        print(stop_message(number, folder, ["local"], str(_LAUNCH)), file=sys.stderr)
        return
    summary = read_summary(folder)
    if summary is not None:
        print("\n".join(summary_lines(summary, folder)), file=sys.stderr)
        return
    print(f"error: the run is not finished: {why}", file=sys.stderr)
    if isinstance(getattr(sys, "last_value", None), PsError | None):  # the script itself ended as if all were well
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
