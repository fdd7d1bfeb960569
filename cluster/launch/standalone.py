"""The cluster of a script that was started by itself: it gets a coordinator and a server of its own."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import roundtable
from roundtable.cluster.launch.starting import start_coordinator, start_server, trusting
from roundtable.cluster.options.resume import stop_message
from roundtable.cluster.process.children import GATHER_S, TICK_S, Processes, root_cause
from roundtable.cluster.run.run_directory import LOGS, claim, read_summary, tidy_log, write_settings
from roundtable.cluster.run.summary import summary_lines
from roundtable.common.config.settings import Settings
from roundtable.common.runtime.errors import ClusterError
from roundtable.common.storage.run_files import SETTINGS_FILE

#: Seconds for the coordinator and the server to end after the worker.
_END_S = 10.0
#: Flags of the coordinator. No other worker could take over, and this one may pause, as by Ctrl-Z, so it never counts as lost.
_FLAGS = ("--heartbeat-timeout", "1e6")
_LAUNCH = Path(roundtable.__file__).with_name("cli.py")


class Companions:
    """The coordinator and the server of the one worker of a run, which is kept in runs/<name>."""

    def __init__(self, script: str, name: str, args: Sequence[str]) -> None:
        """Start the coordinator and the server. The run directory names `script` and `args` as what is run.

        Raises UsageError if the run directory cannot be used, or ClusterError if the coordinator or the server does not start.
        """
        self._cleanup = ExitStack()
        try:
            self.folder, _ = self._cleanup.enter_context(claim(None, name or "run", overwrite=False))
            write_settings(self.folder / SETTINGS_FILE, Settings(workers=1, servers=1), script, args)
            self._cleanup.callback(tidy_log, self.folder)
            self._processes = self._cleanup.enter_context(Processes(self.folder / LOGS, os.environ))
            program = [sys.executable, str(_LAUNCH)]
            #: The coordinator's address.
            self.address = start_coordinator(self._processes, program, self.folder, 0, self._tick, flags=_FLAGS)
            start_server(self._processes, program, self.address, 0, flags=trusting(sys.path[0] or "."))
        except OSError as error:
            self._cleanup.close()
            why = error.strerror or error
            raise ClusterError(f"the coordinator and server of this script cannot be started: {why}.") from None
        except BaseException:
            self._cleanup.close()
            raise

    def _tick(self) -> None:
        time.sleep(TICK_S)
        self._processes.poll()
        for child in self._processes.failures():
            raise ClusterError(child.describe_end())

    def stop(self) -> None:
        """Stop the coordinator and the server at once."""
        self._cleanup.close()

    def end(self, stop_signal: int) -> str:
        """Wait until the coordinator and the server have ended, as the worker has left. Print the results on stderr.

        Return why the run is not finished, or '' if it is. If `stop_signal` has told the worker to stop, print the command that
        resumes the run instead. 0 is no signal.
        """
        with self._cleanup:
            if stop_signal:
                for child in self._processes.running("coordinator"):  # it has made a checkpoint, and lets the worker leave
                    os.kill(child.popen.pid, signal.SIGINT)
            self._await_end()
            failures = self._processes.failures()
            why = root_cause(failures).describe_end() if failures else f"its logs are in {self.folder / LOGS}."
        if stop_signal:
            print(stop_message(stop_signal, self.folder, ["local"], str(_LAUNCH)), file=sys.stderr)
            return ""
        summary = read_summary(self.folder)
        if summary is None:
            return why
        print("\n".join(summary_lines(summary, self.folder)), file=sys.stderr)
        return ""

    def _await_end(self) -> None:
        deadline = time.monotonic() + _END_S
        while self._processes.running() and time.monotonic() < deadline:
            time.sleep(TICK_S)
            self._processes.poll()
            if self._processes.failures():  # the other process may say why in a moment
                deadline = min(deadline, time.monotonic() + GATHER_S)
