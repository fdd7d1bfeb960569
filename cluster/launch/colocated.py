"""A server on the host of a worker: a child of the worker's process, which watches it. The server ends with the worker. If it is
killed, it is restarted.

If each of N workers has a server beside it, a server holds 1/N of the parameters. A worker reaches its own server through shared
memory. So a host sends (N-1)/N of the gradients and of the weights, and receives as much: the traffic of a ring all-reduce
(Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 2009).
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import BinaryIO

from roundtable.cluster.launch.checks import check_script
from roundtable.cluster.launch.starting import start_server
from roundtable.cluster.process.children import GATHER_S, TICK_S, Child, Processes
from roundtable.cluster.process.restart_policy import RestartPolicy
from roundtable.cluster.run.exit_codes import exit_code
from roundtable.common.network.addresses import split, to_advertise
from roundtable.common.protocol import liveness
from roundtable.common.runtime.errors import ClusterError, PsError, UsageError
from roundtable.common.runtime.signal_handlers import handled

log = logging.getLogger("roundtable.cluster.colocated")

#: Seconds between two log lines of a worker that has left the run while its server still serves others.
_TELL_S = 10.0
#: The signal that tells the main thread that the server has failed. It has no other use, and does nothing without a handler.
_SIGNAL = signal.SIGURG
#: Environment variable with the number of the server's restarts. It outlives a restart of this process.
_COUNT_VARIABLE = "ROUNDTABLE_SERVER_RESTARTS"
#: The shortest pause before a restart of the server, in seconds: a worker that restarts kills its server just before.
_SHORTEST_S = 0.2


@contextlib.contextmanager
def server_beside(
    program: Sequence[str],
    coordinator: str,
    index: int | None,
    script: str | None,
    restart_policy: RestartPolicy,
    device: str,
    start_s: float,
    advertise: str | None = None,
) -> Iterator[None]:
    """Run a server beside this process, which will be worker `index` of `coordinator`'s run and will run `script`.

    The server waits for the run to start for `start_s` seconds, as the worker does.
    If `advertise` is given, the server tells others to connect to it, and listens at its port, if it has one.
    The server's log goes to stderr. A server that hangs is killed. A killed server is restarted, as `restart_policy` says.
    Within the context, its failure is raised in the main thread: UsageError if the server was refused, else ClusterError.
    After the context the server goes on until the run or this process ends.
    """
    if script is not None:
        check_script(script)  # before a server joins that others would then lose
    cleanup = ExitStack()
    signs = cleanup.enter_context(contextlib.closing(liveness.Listener()))
    try:
        with TemporaryDirectory() as folder:  # the log lives on without a name, so no kill leaves it behind
            env = {**os.environ, liveness.VARIABLE: str(signs.write)}
            processes = cleanup.enter_context(Processes(Path(folder), env, files=[signs.write]))
            bind, flags = "tcp://*:0", ["--start-timeout", str(start_s)]
            if advertise is not None:
                bind = f"tcp://*:{split(to_advertise(advertise, bind))[1]}"
                flags += ["--advertise", advertise]
            server = start_server(processes, program, coordinator, index, device, bind, flags)
            log_file = server.log.open("rb")
        server.log = Path(f"/proc/self/fd/{log_file.fileno()}")
    except OSError as error:
        cleanup.close()
        raise ClusterError(f"the server beside this worker cannot be started: {error.strerror or error}.") from None
    watch = _Watch(processes, server, log_file, restart_policy, signs)
    atexit.register(_end, cleanup, watch)
    before = signal.signal(_SIGNAL, watch.on_signal)
    watch.start()
    try:
        yield
    except BaseException as error:
        code = exit_code(error)
        watch.stop_signal = code - 128 if code in (128 + signal.SIGINT, 128 + signal.SIGTERM) else 0
        watch.patience_s = 0.0 if code and not watch.stop_signal else float("inf")
        raise
    finally:
        signal.signal(_SIGNAL, before)


class _Watch(threading.Thread):
    """Watches the server: copies its log to stderr, kills it if it hangs, and restarts it.

    If the server has failed for good, the watch makes the main thread raise.
    """

    def __init__(
        self, processes: Processes, server: Child, log_file: BinaryIO, restart_policy: RestartPolicy, signs: liveness.Listener
    ) -> None:
        super().__init__(name="server", daemon=True)
        #: Set when this worker has left the run, so that the server is not restarted.
        self.over = threading.Event()
        #: Seconds to wait for the server to end with the run, which may go on without this worker. 0 if the worker has failed:
        #: it may not have joined the run.
        self.patience_s = float("inf")
        #: The signal that has told the worker to stop, or 0. The server leaves too.
        self.stop_signal = 0
        self._processes = processes
        self._server = server
        self._log_file = log_file
        self._restart_policy = restart_policy
        self._signs = signs

    def run(self) -> None:
        self._until_it_ends()
        while self._starts_again():
            self._until_it_ends()
        if self._server.failed and not self._server.was_stopped:
            if self._server.code != -signal.SIGKILL:
                time.sleep(GATHER_S)  # if the run has failed, the worker is told the reason, and raises it
            signal.pthread_kill(threading.main_thread().ident or 0, _SIGNAL)

    def _until_it_ends(self) -> None:
        while self._server.code is None:
            time.sleep(TICK_S)
            self._processes.poll()
            with contextlib.suppress(OSError, ValueError):  # our stderr is closed
                sys.stderr.buffer.write(self._log_file.read())
                sys.stderr.flush()
            if self._server.code is None and self._signs.hangs(time.monotonic()):
                log.warning("the server beside this worker does not respond; killing it.")
                self._signs.begins()
                self._server.popen.kill()

    def _starts_again(self) -> bool:
        """Restart the server after a pause, if it was killed and may be restarted. Return whether it was restarted."""
        done, code = int(os.environ.get(_COUNT_VARIABLE, "0")), self._server.code
        was_ended = code is not None and (code < 0 or self._server.was_stopped)
        if self.over.is_set() or not was_ended or done >= self._restart_policy.times:
            return False
        pause_s = max(_SHORTEST_S, self._restart_policy.pause_s(done))
        log.warning("the server beside this worker %s; %s.", self._server.end(), self._restart_policy.plan(done, pause_s))
        if self.over.wait(pause_s):
            return False
        os.environ[_COUNT_VARIABLE] = str(done + 1)
        try:
            self._processes.again(self._server)
        except OSError as error:
            log.error("the server beside this worker cannot be restarted: %s.", error.strerror or error)
            return False
        return True

    def tell(self, number: int) -> None:
        """Pass a signal to the worker on to the server. 0 is no signal."""
        with contextlib.suppress(ProcessLookupError):
            if number and self._server.code is None:
                os.kill(self._server.popen.pid, number)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._server.failed:
            kind: type[PsError] = UsageError if self._server.code == 2 else ClusterError
            raise kind(f"the server beside this worker {self._server.end()}.")


def _end(cleanup: ExitStack, watch: _Watch) -> None:
    """Wait for the server's end and clean up. Called when the script has ended and the worker has left the run."""
    watch.over.set()
    watch.tell(watch.stop_signal)
    with cleanup, handled((signal.SIGTERM, signal.SIGINT), watch.tell):
        until = time.monotonic() + watch.patience_s
        while watch.is_alive() and time.monotonic() < until:
            watch.join(_TELL_S)
            if watch.is_alive():
                log.info("this worker has left; the server beside it serves the others until the run ends.")
    watch.join(4 * TICK_S)  # for its last lines
