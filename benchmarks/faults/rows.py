"""All rows of the fault matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import SCRIPTS
from benchmarks.attacks.deeds import DEEDS
from benchmarks.attacks.strangers import ITEMS
from benchmarks.attacks.wiretap import Wire
from benchmarks.faults import spread
from benchmarks.faults.harms import clock, disk, endings, joining, processes, wire
from benchmarks.faults.harms.base import Harm
from benchmarks.faults.outcome import CUT, DEAD, SILENT, STOPPED, UNHARMED, WOKEN, Bounds
from benchmarks.faults.row import HOUR_S, SERVERS, WORKERS, Row
from roundtable.common.runtime.failpoints import POINTS, VARIABLE

#: The round at which a process fails at a failpoint.
_FAIL_AT = 60
#: The processes that fail at failpoints. The server has two chunks, so that it can fail after one is applied.
_WHO = {"worker": "worker-1", "server": "server-2", "coordinator": "coordinator"}
_LONG = ("--epochs", 40)
#: Epochs for each second of random kills, so that a run surely lasts.
_EPOCHS_CHURNED = 1.0
_ASYNC = ("--policy", "async")
#: Policies whose weights depend on the order of events, with failpoints; and failpoints with tensors in messages.
_INEXACT = {
    "pushing": ("async", "ssp", "backup"),
    "receiving": ("async",),
    "aggregating": ("async",),
    "applying": ("async", "ssp", "backup"),
    "applied": ("async",),
    "saving": ("async", "ssp"),
    "reported": ("async", "ssp", "backup"),
}
_THROUGH_SOCKETS = ("pushing", "receiving", "aggregating")
#: All tensors go through sockets, because strangers come from there.
_SOCKETS = (*_LONG, "--transport", "tcp")
#: Each server's shard has a backup, so that no round may be lost.
_COPIES = ("--replicas", 1)
_TO_THE_END = str(SCRIPTS / "train_to_the_end.py")
_NOT_FINITE = str(SCRIPTS / "train_not_finite.py")
_FAILED = r"error: \S+ failed: worker-\d's gradient of .* in micro-batch.* of round \d+ is not finite.*--on-nonfinite skip"


def rows(churn_s: float, folder: Path) -> dict[str, Row]:
    """Return all faults by name. `folder` is for their files."""
    workers = tuple(f"worker-{n}" for n in range(WORKERS))
    everybody = ("coordinator", *(f"server-{n}" for n in range(SERVERS)), *workers)
    table = {"nothing": Row(processes.nothing, bounds=UNHARMED)}
    for point, where in POINTS.items():
        kind = where.partition(":")[0]
        round_ = 0 if point in ("uploading", "ending") else _FAIL_AT
        env = {VARIABLE: f"{_WHO[kind]}:{point}:{round_}:kill"}
        name = f"{'the' if kind == 'coordinator' else 'a'} {kind}, at {point}"
        table[name] = Row(processes.failpoints(1), env=env)
        if kind == "server":
            table[f"{name}, with copies"] = Row(processes.failpoints(1), _COPIES, env=env)
        if point in _THROUGH_SOCKETS:
            table[f"{name}, through sockets"] = Row(processes.failpoints(1), ("--transport", "tcp"), env=env)
        for policy in _INEXACT.get(point, ()):
            table[f"{name}, {policy}"] = Row(processes.failpoints(1), ("--policy", policy), env=env, is_inexact=True)
    phases = ("computing", "pushing", "pushed", "receiving")
    at = ";".join(f"{name}:{phases[n]}:{_FAIL_AT}:kill" for n, name in enumerate(workers))
    two = f"server-2:applying:{_FAIL_AT}:kill;coordinator:reported:{_FAIL_AT}:kill"
    stopped = f"worker-1:pushing:{_FAIL_AT}:stop"
    forward, forward_env = clock.clock(folder / "forward", HOUR_S)
    back, back_env = clock.clock(folder / "back", -HOUR_S)
    forward_too, forward_too_env = clock.clock(folder / "forward-by-hand", HOUR_S)
    back_too, back_too_env = clock.clock(folder / "back-by-hand", -HOUR_S)
    slow, slow_env = disk.slow_disk(folder / "slow-disk", 1.0, 8.0)
    churn = ("--epochs", max(60, round(_EPOCHS_CHURNED * churn_s)), "--max-restarts", 1000, "--restart-delay", 0)
    return table | {
        "all workers, each at another point": Row(processes.failpoints(WORKERS), env={VARIABLE: at}),
        "a server and the coordinator, mid-round": Row(processes.failpoints(2), env={VARIABLE: two}),
        "a worker stopped mid-message for 6 s, then woken": Row(
            processes.failpoint_then_wake(6.0, "worker-1"), _LONG, env={VARIABLE: stopped}
        ),
        "a worker's script fails, and --worker-failures admits it": Row(
            processes.failpoints(1), ("--worker-failures", 1), env={VARIABLE: f"worker-1:computing:{_FAIL_AT}:raise"}
        ),
        "a worker joins whose script fails": Row(
            joining.scale_to(WORKERS + 1), _LONG, env={VARIABLE: f"worker-{WORKERS}:computing:0:raise"}
        ),
        "all workers killed": Row(processes.kill(*workers)),
        "two of three servers killed": Row(processes.kill("server-0", "server-2")),
        "coordinator and a server killed": Row(processes.kill("coordinator", "server-1")),
        "coordinator and a worker killed": Row(processes.kill("coordinator", "worker-1")),
        "all but the launcher killed": Row(processes.kill(*everybody)),
        "a worker stopped 6 s, then woken": Row(processes.stop("worker-1", 6.0)),
        "a server stopped 18 s, then woken": Row(processes.stop("server-1", 18.0), bounds=SILENT),
        "a server stopped 18 s, then woken, with copies": Row(processes.stop("server-1", 18.0), _COPIES, bounds=SILENT),
        "two of three servers killed, with copies": Row(processes.kill("server-0", "server-2"), _COPIES),
        "coordinator and a server killed, with copies": Row(processes.kill("coordinator", "server-1"), _COPIES),
        "the coordinator stopped 6 s, then woken": Row(processes.stop("coordinator", 6.0)),
        "a worker 5 times slower": Row(processes.slow("worker-1", 5), bounds=UNHARMED),
        "a worker joins every second": Row(joining.join(4, 1.0), ("--epochs", 60), bounds=UNHARMED),
        "a worker joins in every round": Row(joining.join_every_round(4), bounds=None),
        "power loss, then --resume": Row(endings.power_loss(damaged=False)),
        "power loss, newest checkpoint damaged": Row(endings.power_loss(damaged=True)),
        "launcher killed, then --resume": Row(endings.launcher_killed),
        "6 servers for 4 chunks, one that has none killed": Row(processes.kill("server-5"), servers=6),
        "6 servers for 4 chunks, one that has one killed": Row(processes.kill("server-1"), servers=6),
        "6 servers for 4 chunks, power loss, then --resume on 3": Row(endings.power_loss(False, "--servers", 3), servers=6),
        **_at_the_end(),
        **_told_to_stop(everybody),
        **_on_the_wire(folder),
        **_not_finite(),
        "disk full for 5 s": Row(disk.fill(5.0), _LONG, on_small_disk=True, bounds=None),
        "run directory read-only for 5 s": Row(disk.read_only(5.0), _LONG, on_small_disk=True, bounds=None),
        "all that waits for the disk waits 1 s longer, for 8 s": Row(slow, ("--epochs", 60), env=slow_env, bounds=None),
        "clock an hour ahead, coordinator killed": Row(forward, env=forward_env),
        "clock an hour back, coordinator killed": Row(back, env=back_env),
        "clock an hour ahead, coordinator killed, another started by hand": Row(forward_too, env=forward_too_env, by_hand=True),
        "clock an hour back, coordinator killed, another started by hand": Row(back_too, env=back_too_env, by_hand=True),
        "network between a worker and a server cut one way for 10 s": Row(
            processes.nothing, _LONG, network=spread.cut(10.0, both_ways=False), bounds=CUT
        ),
        "network between a worker and a server cut both ways for 10 s": Row(
            processes.nothing, _LONG, network=spread.cut(10.0, both_ways=True), bounds=CUT
        ),
        "network between a worker and a server cut both ways for 30 s": Row(
            processes.nothing, ("--epochs", 60), network=spread.cut(30.0, both_ways=True), bounds=CUT
        ),
        "network between a worker and a server cut for good, so that the worker is given up": Row(
            processes.nothing, ("--epochs", 60, "--progress-timeout", 5), network=spread.cut_off, bounds=CUT
        ),
        "a server that a worker cannot reach from the beginning, so that the others train": Row(
            processes.nothing, ("--progress-timeout", 12), network=spread.cannot_reach, scene=spread.Unreached, bounds=None
        ),
        "names of the coordinator and of a server that nobody knows at first": Row(
            processes.nothing, network=lambda run: None, scene=spread.Unresolved, bounds=UNHARMED
        ),
        "two hosts with one name: a server with the coordinator's process id and a worker with a stranger's stopped 18 s": Row(
            processes.nothing, _COPIES, network=spread.stop_namesakes, scene=spread.Namesakes, bounds=WOKEN
        ),
        "by IPv6, coordinator killed, another started by hand": Row(
            processes.coordinator_killed, by_hand=True, bind="tcp://[::1]:0"
        ),
        "every message 200 ms late": Row(processes.nothing, ("--rounds", 30), delay_s=0.2, bounds=UNHARMED),
        f"{churn_s:.0f} s of random kills": Row(joining.churn(churn_s), churn, bounds=None),
        f"{churn_s:.0f} s of random kills, with copies": Row(joining.churn(churn_s), (*churn, *_COPIES), bounds=None),
        f"{churn_s:.0f} s of random kills, async": Row(joining.churn(churn_s), (*churn, *_ASYNC), is_inexact=True, bounds=None),
    }


def _on_the_wire(folder: Path) -> dict[str, Row]:
    """Return rows with bad input on the wire, by a stranger to all listening processes."""
    found = {
        f"strangers: {name}": Row(wire.strangers(item), _SOCKETS, bounds=UNHARMED, refused=item.refused)
        for name, item in ITEMS.items()
    } | {
        f"a worker that has joined: {name}": Row(
            wire.joined(deed), (*_SOCKETS, *deed.flags), bounds=UNHARMED, refused=deed.refused
        )
        for name, deed in DEEDS.items()
    }
    again, lost, restarted = (Wire(folder / name) for name in ("again", "lost", "anew"))
    unruly = Wire(folder / "unruly", is_unruly=True)
    return found | {
        "strangers: messages of members once more": Row(wire.overheard(again), _SOCKETS, again.env),
        "strangers: messages of an earlier epoch once more, and of a worker that was lost": Row(
            wire.overheard(lost, wire.a_worker_is_lost), _SOCKETS, lost.env, refused=("sender",)
        ),
        "strangers: messages of before all restarted": Row(
            wire.overheard(restarted, wire.all_restart, to_all=True), _SOCKETS, restarted.env, refused=("run",)
        ),
        "all connections reset, again and again": Row(wire.broken_connections, _SOCKETS, bounds=CUT),
        "messages sent twice, and after later ones": Row(wire.unruly(unruly), _SOCKETS, unruly.env, bounds=UNHARMED),
    }


def _told_to_stop(everybody: Sequence[str]) -> dict[str, Row]:
    """Return rows of SIGTERM. A run that ends with it goes on by `--resume auto`, and its pause lasts until then."""
    late = ("--progress-timeout", 5)
    return {
        "SIGTERM of the launcher, then --resume auto": Row(endings.told_to_stop(), bounds=STOPPED),
        "SIGTERM of the coordinator, then --resume auto": Row(endings.told_to_stop("coordinator"), bounds=STOPPED),
        "SIGTERM of all but the launcher, then --resume auto": Row(endings.told_to_stop(*everybody), bounds=STOPPED),
        "SIGTERM of a worker": Row(endings.tell("worker-1"), bounds=UNHARMED),
        "SIGTERM of a server": Row(endings.tell("server-1")),
        "SIGTERM of a server, with copies": Row(endings.tell("server-1"), _COPIES),
        "the first worker comes late to its first batch": Row(processes.nothing, late, bounds=None, script=(_TO_THE_END, "late")),
    }


def _at_the_end() -> dict[str, Row]:
    """Return rows in which scripts end early, or do something after the last round. The run must end well, with the model."""

    def row(how: str, harm: Harm = processes.nothing, bounds: Bounds | None = None, flags: Sequence[object] = ()) -> Row:
        return Row(harm, flags, bounds=bounds, script=(_TO_THE_END, how))

    return {
        "a worker's script ends early": row("leave", bounds=UNHARMED),
        "the first worker's script ends early": row("exit", bounds=UNHARMED),
        "a worker evaluates for longer than --progress-timeout": row("evaluate", flags=("--progress-timeout", 5)),
        "a worker fails after the last round": row("raise"),
        "a worker is killed after the last round": row("kill"),
        "a server killed while a worker evaluates": row("evaluate", processes.kill_with_model("server-1")),
        "the coordinator killed while a worker evaluates": row("evaluate", processes.kill_with_model("coordinator")),
    }


def _not_finite() -> dict[str, Row]:
    """Return rows with a gradient that is NaN or infinite, once an epoch."""

    def row(how: str, harm: Harm, bounds: Bounds | None = DEAD, fails: bool = False) -> Row:
        flags = ("--transport", "tcp", "--on-nonfinite", how)
        return Row(harm, flags, is_inexact=fails, bounds=bounds, fails=fails, script=(_NOT_FINITE,))

    return {
        "gradients not finite, skip, a worker killed": row("skip", processes.kill("worker-1")),
        "gradients not finite, allow, a worker killed": row("allow", processes.kill("worker-1")),
        "gradients not finite, fail": row("fail", endings.fails(_FAILED), None, fails=True),
    }
