"""The launcher of a run on this machine: it starts, watches and stops the coordinator, servers and workers."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roundtable.cluster.launch.scale import take
from roundtable.cluster.launch.starting import prepared, start_coordinator, start_server, threads, trusting
from roundtable.cluster.launch.supervisor import Supervisor
from roundtable.cluster.options.resume import stop_message
from roundtable.cluster.process.children import GATHER_S, TICK_S, Processes, root_cause
from roundtable.cluster.process.output import forgiving_output
from roundtable.cluster.process.restart_policy import RestartPolicy
from roundtable.cluster.process.signals import StopSignals
from roundtable.cluster.run.console import Screen
from roundtable.cluster.run.exit_codes import STOPPED, USAGE
from roundtable.cluster.run.run_directory import LOGS, read_summary, tidy_log, write_settings
from roundtable.cluster.run.summary import check_trained, count, summary_lines
from roundtable.common.config.launching import module_of, rank_variables, words_of
from roundtable.common.config.settings import Settings
from roundtable.common.policies import load
from roundtable.common.runtime.errors import ClusterError, Stopped, UsageError
from roundtable.common.runtime.restart import AGAIN_VARIABLE
from roundtable.common.storage.run_files import SETTINGS_FILE, How

log = logging.getLogger("roundtable.cluster.local")

#: Seconds for the fork server to import the modules of servers and workers. After that they import the modules themselves.
_PREPARED_S = 60.0
#: Seconds for the servers to end after the coordinator.
_SERVERS_END_S = 10.0
#: Seconds after a worker's end for its joining to be seen in the event log.
_JOIN_S = 2.0
#: Seconds for the coordinator to say whether a run goes on without a worker that has failed.
_WORD_S = 15.0
#: Environment of the processes that may ask to be restarted at once.
_AGAIN = {AGAIN_VARIABLE: "1"}
#: The fewest restarts that a killed coordinator gets.
_RECOVERIES = 5


@dataclass(frozen=True)
class LaunchSpec:
    """A run to launch. If `script` is None, it runs the built-in example. `port` 0 is any free port.

    `script` is a file's path, or a module as `-m package.module`.
    """

    settings: Settings
    run_dir: Path
    script: str | None = None
    args: tuple[str, ...] = ()
    port: int = 0
    restart_policy: RestartPolicy = field(default_factory=RestartPolicy)
    #: The way in which a run that is in `run_dir` goes on.
    how: How = "begin"
    #: Whether a checkpoint of another version of this program or of torch may be resumed.
    accept_versions: bool = False
    #: Modules that the fork server imports for all servers and workers.
    modules: tuple[str, ...] = ("roundtable.ps.server.server", "roundtable.worker.tools.builtin_script")
    #: Devices of the servers, which take turns.
    devices: Sequence[str] = ("cpu",)


@forgiving_output()
def run_local(order: LaunchSpec, program: Sequence[str], env: Mapping[str, str], screen: Screen) -> dict[str, Any]:
    """Run `order` to its end, show it on `screen`, and return its summary.

    `program` is the command line of this program, to which the names of commands are added. `env` is the environment of all
    processes. Raises ClusterError, which names the process and its log, if a process fails. Raises UsageError if it fails by
    its user's mistake. Raises Stopped on Ctrl-C, SIGTERM and SIGHUP; after the first of them the run makes a checkpoint.
    No process is left, however the run ends.
    """
    folder = order.run_dir
    try:
        with StopSignals() as signals:
            try:
                with screen, Processes(folder / LOGS, env) as processes:
                    _Local(order, program, env, processes, signals, screen).run()
            except Stopped as stopped:
                screen.report(stop_message(stopped.number, folder, ["local"]))
                raise
    finally:
        tidy_log(folder)
    summary = read_summary(folder)
    if summary is None:
        raise ClusterError(f"the coordinator ended without a summary; its log is {folder / LOGS / 'coordinator.log'}.")
    for line in summary_lines(summary, folder):
        screen.report(line)
    check_trained(summary, order.script, folder)
    return summary


class _Local:
    """The loop that starts and watches the processes of one run. Its caller stops them afterwards."""

    def __init__(
        self,
        order: LaunchSpec,
        program: Sequence[str],
        env: Mapping[str, str],
        processes: Processes,
        signals: StopSignals,
        screen: Screen,
    ) -> None:
        self._order = order
        self._program = list(program)
        self._env = env
        self._processes = processes
        self._signals = signals
        self._screen = screen
        self._recoveries = max(_RECOVERIES, order.restart_policy.times)
        self._supervisor: Supervisor | None = None
        #: When all processes were started. On a busy machine a coordinator that ends at once may have ended long before.
        self._started_at = float("-inf")
        #: Until when the coordinator may make a checkpoint. None before a stop signal has come.
        self._stops_until: float | None = None

    def run(self) -> None:
        """Start all processes, and return when every one has ended well."""
        order, settings = self._order, self._order.settings
        what = order.script or f"{settings.example.model} on {settings.example.data}"
        self._screen.say(
            f"{order.run_dir}: {what}, policy {settings.policy}, "
            f"{count(settings.workers, 'worker')}, {count(settings.servers, 'server')}"
        )
        try:
            write_settings(order.run_dir / SETTINGS_FILE, settings, order.script, order.args)
            fork_server = self._processes.prepare(order.modules, **threads(settings.threads))
            flags = ["--allow-version-mismatch"] * order.accept_versions
            env = {**self._screen.alarm.env, **_AGAIN}
            address = start_coordinator(
                self._processes, self._program, order.run_dir, order.port, self._tick, order.how, flags, env,
                settings.start_timeout, self._screen.say,
            )  # fmt: skip
            deadline = time.monotonic() + _PREPARED_S
            while fork_server.coming and time.monotonic() < deadline:
                self._tick()
            self._start_others(address)
            self._started_at = time.monotonic()
        except OSError as error:
            raise ClusterError(f"the run's processes cannot be started: {error.strerror or error}.") from None
        while self._processes.running():
            self._tick()
            if not self._is_stopping:
                self._check_workers_joined()
                self._check_end()

    def _start_others(self, address: str) -> None:
        settings, path = self._order.settings, self._order.script
        flags = trusting(Path(path).parent if path is not None and module_of(path) is None else Path())
        for index in range(settings.servers):
            device = self._order.devices[index % len(self._order.devices)]
            start_server(self._processes, self._program, address, index, device, flags=flags, **_AGAIN)
        script = [*words_of(self._order.script), "--", *self._order.args] if self._order.script is not None else []

        def worker(index: int | None) -> list[str]:
            number = [] if index is None else ["--index", str(index)]
            return [*self._program, "worker", "--coordinator", address, *number, *script]

        def env(number: int, workers: int) -> dict[str, str]:
            return {**threads(settings.threads), **_AGAIN, **rank_variables(self._env, number, workers, number)}

        is_local = load(settings).is_local
        self._supervisor = Supervisor(self._processes, worker, env, self._order.restart_policy, is_local, self._screen.say)
        self._supervisor.start(settings.workers)

    def _tick(self) -> None:
        """Wait a moment, then look at the signals, the processes and the event log. Raise the error that ends the run."""
        time.sleep(TICK_S)
        self._processes.poll()
        if self._is_stopping and self._signals.first is not None:
            self._stop(self._signals.first)
            return
        self._check_stopped()
        self._recover_coordinator()
        if self._supervisor is not None and (code := self._processes.children[0].code) in (None, 0):
            if (wanted := take(self._order.run_dir)) is not None:
                self._supervisor.scale(wanted)
            self._supervisor.look(self._screen.progress, finished=code == 0)
        if self._processes.failures():
            self._fail()
        self._screen.update(has_log=self._supervisor is not None)  # before that the log may be of an earlier part

    @property
    def _is_stopping(self) -> bool:
        """Return whether a stop signal has come. A first one counts only if the coordinator has not ended well already."""
        has_ended_well = bool(self._processes.children) and self._processes.children[0].code == 0
        return self._signals.first is not None and (self._signals.count > 1 or not has_ended_well)

    def _stop(self, number: signal.Signals) -> None:
        """Raise Stopped once the coordinator has made a checkpoint and has ended, or at a second signal."""
        coordinator = self._processes.running("coordinator")
        is_over = not coordinator or self._supervisor is None or self._signals.count > 1
        if self._stops_until is None and not is_over:
            stop_s = self._order.settings.stop_timeout
            self._screen.say(f"{number.name}: ending the round and making a checkpoint, in {stop_s:g} s at most; a second signal "
                             "stops at once.")  # fmt: skip
            self._processes.start_no_more()
            self._stops_until = time.monotonic() + stop_s + _SERVERS_END_S
            with contextlib.suppress(ProcessLookupError):
                os.kill(coordinator[0].popen.pid, signal.SIGINT)
        if is_over or time.monotonic() > (self._stops_until or 0.0):
            raise Stopped(number)
        self._screen.update()

    def _check_stopped(self) -> None:
        """Raise Stopped if a signal has told the coordinator to stop. It tells the servers and workers first, which then end."""
        coordinator = next((child for child in self._processes.children if child.name == "coordinator"), None)
        if coordinator is None or not (coordinator.was_stopped or any(c.code == STOPPED for c in self._processes.children)):
            return
        deadline = time.monotonic() + _SERVERS_END_S
        while coordinator.code is None and time.monotonic() < deadline:
            time.sleep(TICK_S)
            self._processes.poll()
        if coordinator.code is not None and coordinator.was_stopped:
            raise Stopped(coordinator.code - 128)

    def _recover_coordinator(self) -> None:
        """Restart a coordinator that was killed. The others wait for it and lose nothing. A coordinator that failed is
        not restarted."""
        child = next((child for child in self._processes.failures() if child.name == "coordinator"), None)
        if child is None or child.code is None or child.code > 0 or not self._recoveries:
            return
        self._recoveries -= 1
        self._screen.say(f"the coordinator {child.end()}; restarting it.")
        child.command = prepared(child.command, "recover")
        self._processes.again(child)

    def _fail(self) -> None:
        """Give other processes a moment to fail too, then raise for the failure that caused the others.

        Return if the run goes on without the failed processes, as the coordinator decides for workers, or has ended well.
        """
        began = time.monotonic()
        while self._processes.running() and self._signals.first is None:
            self._check_stopped()
            cause = root_cause(self._processes.failures())
            if cause.code is not None and cause.code < 0:
                break  # no log can explain a kill
            coordinator = self._processes.children[0]
            awaits = (
                coordinator.code is None and self._supervisor is not None and self._supervisor.awaits_word(self._screen.progress)
            )
            if time.monotonic() > began + (_WORD_S if awaits else GATHER_S):
                break
            time.sleep(TICK_S)
            self._processes.poll()
            if self._supervisor is not None and coordinator.code in (None, 0):
                self._screen.update()
                self._supervisor.look(self._screen.progress, finished=coordinator.code == 0)
                if not self._processes.failures():
                    return
        cause = root_cause(self._processes.failures())
        raise (UsageError if cause.code == USAGE else ClusterError)(cause.describe_end())

    def _check_workers_joined(self) -> None:
        """Raise ClusterError if a worker has ended well without joining: the others would wait for it."""
        if not self._processes.running("coordinator"):
            return
        joined = self._screen.progress.joined
        for child in self._processes.children:
            ended = child.code == 0 and not child.leaves and time.monotonic() > child.ended_at + _JOIN_S
            if ended and child.name.startswith("worker") and child.popen.pid not in joined:
                what = self._order.script or "the example"
                raise ClusterError(
                    f"{child.name} did not join the run: {what} ended without calling roundtable.join(); see {child.log}."
                )

    def _check_end(self) -> None:
        """Raise ClusterError for a process that runs for too long after the coordinator has ended."""
        coordinator = self._processes.children[0]
        if coordinator.code is None:
            return
        if self._supervisor is not None and coordinator.code == 0 and time.monotonic() > coordinator.ended_at + _JOIN_S:
            self._supervisor.kill_late(self._screen.progress)
        for role, patience_s in (("server", _SERVERS_END_S), ("worker", self._order.settings.progress_timeout)):
            late = self._processes.running(role)
            if late and time.monotonic() > max(coordinator.ended_at, self._started_at) + patience_s:
                raise ClusterError(
                    f"{late[0].name} still runs {patience_s:.0f} s after the run has ended, and was stopped; "
                    f"its log is {late[0].log}."
                )
