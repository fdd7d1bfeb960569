"""The fault matrix: do harm to real runs, and compare their results with those of an undisturbed run.

`python -m benchmarks.faults` prints a table in Markdown. A process fails at a named point of the code
(`common/runtime/failpoints.py`), or is killed or stopped at any moment while rounds go on. A row can be repeated, so that the
moment differs.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import click

from benchmarks import harms, network, spread
from benchmarks.attacks import DEEDS, ITEMS
from benchmarks.harms import Harm
from benchmarks.live import LENGTH, LOOPBACK, TRAINING, ByHand, Cluster
from benchmarks.wiretap import Wire
from roundtable.cluster.process.children import Processes
from roundtable.common.runtime.errors import PsError, UsageError
from roundtable.common.runtime.failpoints import MARK, POINTS, VARIABLE
from roundtable.common.storage.event_log import RunLogReader

_SERVERS = 3
_WORKERS = 3
#: Rounds before the harm, and before a process fails at a failpoint.
_ROUNDS = 20
_FAIL_AT = 60
#: Events that show that a fault was noticed.
_NOTICED = ("lost", "joined", "restarted", "recovered", "rolled back", "refused", "warning")
#: The processes that fail at failpoints. The server has two chunks, so that one can be applied and the other not.
_WHO = {"worker": "worker-1", "server": "server-2", "coordinator": "coordinator"}
_HOUR_S = 3600
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
_QUICK = ("a worker, at pushed", "a server, at applying", "the coordinator, at reported", "power loss, then --resume")

_TO_THE_END = str(Path(__file__).with_name("train_to_the_end.py"))
_NOT_FINITE = str(Path(__file__).with_name("train_not_finite.py"))
_FAILED = r"error: \S+ failed: worker-\d's gradient of .* in micro-batch.* of round \d+ is not finite.*--on-nonfinite skip"

HEADS = (
    "fault",
    "finished",
    "same bits",
    "each sample once",
    "in bounds",
    "noticed after s",
    "longest pause s",
    "rounds again",
    "micro-batches again",
)


@dataclass(frozen=True)
class Bounds:
    """The promised seconds: until a dead process is noticed (None: none dies), and of the longest pause."""

    noticed_s: float | None
    pause_s: float

    def broken(self, outcome: Outcome) -> str:
        """Return which promise is broken, in the table's numbers, or ''."""
        noticed, pause = outcome.noticed_s, round(outcome.pause_s, 1)
        if self.noticed_s is not None and noticed is not None and round(noticed, 1) > self.noticed_s:
            return f"noticed after {noticed:.1f} s, {self.noticed_s:.0f} are promised"
        return f"a pause of {pause:.1f} s, {self.pause_s:.0f} are promised" if pause > self.pause_s else ""


#: A process dies on this machine, and training is to move 5 s after that is noticed; a server is stopped, which cannot be
#: told from a slow one; one is that nobody starts again, until it is woken; a link is cut; nothing is harmed.
_DEAD, _SILENT, _WOKEN = Bounds(3.0, 8.0), Bounds(15.0, 20.0), Bounds(15.0, 23.0)
#: Nobody is dead, and the run is started again as soon as it has ended.
_STOPPED = Bounds(None, 8.0)
_CUT, _UNHARMED = Bounds(None, 20.0), Bounds(None, 5.0)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run: seconds until the first event that tells of the fault; the longest seconds without a committed round;
    `rounds` that were rolled back; and `recomputed` micro-batches."""

    problem: str = ""
    same: bool = False
    exact: bool = False
    noticed_s: float | None = None
    pause_s: float = 0.0
    rounds: int = 0
    recomputed: int = 0

    @property
    def holds(self) -> bool:
        return not self.problem and self.same and self.exact


@dataclass(frozen=True)
class Row:
    """A fault: the flags and environment of its run, and the harm that is done to it."""

    harm: Harm
    flags: Sequence[object] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    #: The result depends on who computes what, so only the ledger is compared.
    is_inexact: bool = False
    on_small_disk: bool = False
    #: All processes are started one by one, and none is restarted.
    by_hand: bool = False
    #: The address of a coordinator that is started by hand.
    bind: str = LOOPBACK
    #: Of a run on two hosts: what happens to it; what the run is like; and seconds that all takes between them.
    network: spread.Change | None = None
    scene: spread.Scene = spread.Spread
    delay_s: float = 0.0
    #: The promise for this row, if there is one.
    bounds: Bounds | None = _DEAD
    #: Kinds of messages that must have been refused (`common/protocol/rejections.py`).
    refused: Collection[str] = ()
    #: The run must fail, so there are no results but its ledger.
    fails: bool = False
    servers: int = _SERVERS
    #: The script and its arguments, if it is not the built-in example that trains.
    script: Sequence[object] = ()

    @property
    def training(self) -> Sequence[object]:
        """Return the flags of its run."""
        return (*(LENGTH if self.script else TRAINING), *self.flags)


def rows(churn_s: float, folder: Path) -> dict[str, Row]:
    """Return all faults by name. `folder` is for their files."""
    workers = tuple(f"worker-{n}" for n in range(_WORKERS))
    everybody = ("coordinator", *(f"server-{n}" for n in range(_SERVERS)), *workers)
    table = {"nothing": Row(harms.nothing, bounds=_UNHARMED)}
    for point, where in POINTS.items():
        kind = where.partition(":")[0]
        round_ = 0 if point in ("uploading", "ending") else _FAIL_AT
        env = {VARIABLE: f"{_WHO[kind]}:{point}:{round_}:kill"}
        name = f"{'the' if kind == 'coordinator' else 'a'} {kind}, at {point}"
        table[name] = Row(harms.failpoints(1), env=env)
        if kind == "server":
            table[f"{name}, with copies"] = Row(harms.failpoints(1), _COPIES, env=env)
        if point in _THROUGH_SOCKETS:
            table[f"{name}, through sockets"] = Row(harms.failpoints(1), ("--transport", "tcp"), env=env)
        for policy in _INEXACT.get(point, ()):
            table[f"{name}, {policy}"] = Row(harms.failpoints(1), ("--policy", policy), env=env, is_inexact=True)
    phases = ("computing", "pushing", "pushed", "receiving")
    at = ";".join(f"{name}:{phases[n]}:{_FAIL_AT}:kill" for n, name in enumerate(workers))
    two = f"server-2:applying:{_FAIL_AT}:kill;coordinator:reported:{_FAIL_AT}:kill"
    stopped = f"worker-1:pushing:{_FAIL_AT}:stop"
    forward, forward_env = harms.clock(folder / "forward", _HOUR_S)
    back, back_env = harms.clock(folder / "back", -_HOUR_S)
    forward_too, forward_too_env = harms.clock(folder / "forward-by-hand", _HOUR_S)
    back_too, back_too_env = harms.clock(folder / "back-by-hand", -_HOUR_S)
    slow, slow_env = harms.slow_disk(folder / "slow-disk", 1.0, 8.0)
    churn = ("--epochs", max(60, round(_EPOCHS_CHURNED * churn_s)), "--max-restarts", 1000, "--restart-delay", 0)
    return table | {
        "all workers, each at another point": Row(harms.failpoints(_WORKERS), env={VARIABLE: at}),
        "a server and the coordinator, mid-round": Row(harms.failpoints(2), env={VARIABLE: two}),
        "a worker stopped mid-message for 6 s, then woken": Row(
            harms.failpoint_then_wake(6.0, "worker-1"), _LONG, env={VARIABLE: stopped}
        ),
        "a worker's script fails, and --worker-failures admits it": Row(
            harms.failpoints(1), ("--worker-failures", 1), env={VARIABLE: f"worker-1:computing:{_FAIL_AT}:raise"}
        ),
        "a worker joins whose script fails": Row(
            harms.scale_to(_WORKERS + 1), _LONG, env={VARIABLE: f"worker-{_WORKERS}:computing:0:raise"}
        ),
        "all workers killed": Row(harms.kill(*workers)),
        "two of three servers killed": Row(harms.kill("server-0", "server-2")),
        "coordinator and a server killed": Row(harms.kill("coordinator", "server-1")),
        "coordinator and a worker killed": Row(harms.kill("coordinator", "worker-1")),
        "all but the launcher killed": Row(harms.kill(*everybody)),
        "a worker stopped 6 s, then woken": Row(harms.stop("worker-1", 6.0)),
        "a server stopped 18 s, then woken": Row(harms.stop("server-1", 18.0), bounds=_SILENT),
        "a server stopped 18 s, then woken, with copies": Row(harms.stop("server-1", 18.0), _COPIES, bounds=_SILENT),
        "two of three servers killed, with copies": Row(harms.kill("server-0", "server-2"), _COPIES),
        "coordinator and a server killed, with copies": Row(harms.kill("coordinator", "server-1"), _COPIES),
        "the coordinator stopped 6 s, then woken": Row(harms.stop("coordinator", 6.0)),
        "a worker 5 times slower": Row(harms.slow("worker-1", 5), bounds=_UNHARMED),
        "a worker joins every second": Row(harms.join(4, 1.0), ("--epochs", 60), bounds=_UNHARMED),
        "a worker joins in every round": Row(harms.join_every_round(4), bounds=None),
        "power loss, then --resume": Row(harms.power_loss(damaged=False)),
        "power loss, newest snapshot damaged": Row(harms.power_loss(damaged=True)),
        "launcher killed, then --resume": Row(harms.launcher_killed),
        "6 servers for 4 chunks, one that has none killed": Row(harms.kill("server-5"), servers=6),
        "6 servers for 4 chunks, one that has one killed": Row(harms.kill("server-1"), servers=6),
        "6 servers for 4 chunks, power loss, then --resume on 3": Row(harms.power_loss(False, "--servers", 3), servers=6),
        **_at_the_end(),
        **_told_to_stop(everybody),
        **_on_the_wire(folder),
        **_not_finite(),
        "disk full for 5 s": Row(harms.fill(5.0), _LONG, on_small_disk=True, bounds=None),
        "run directory read-only for 5 s": Row(harms.read_only(5.0), _LONG, on_small_disk=True, bounds=None),
        "all that waits for the disk waits 1 s longer, for 8 s": Row(slow, ("--epochs", 60), env=slow_env, bounds=None),
        "clock an hour ahead, coordinator killed": Row(forward, env=forward_env),
        "clock an hour back, coordinator killed": Row(back, env=back_env),
        "clock an hour ahead, coordinator killed, another started by hand": Row(forward_too, env=forward_too_env, by_hand=True),
        "clock an hour back, coordinator killed, another started by hand": Row(back_too, env=back_too_env, by_hand=True),
        "network between a worker and a server cut one way for 10 s": Row(
            harms.nothing, _LONG, network=spread.cut(10.0, both_ways=False), bounds=_CUT
        ),
        "network between a worker and a server cut both ways for 10 s": Row(
            harms.nothing, _LONG, network=spread.cut(10.0, both_ways=True), bounds=_CUT
        ),
        "network between a worker and a server cut both ways for 30 s": Row(
            harms.nothing, ("--epochs", 60), network=spread.cut(30.0, both_ways=True), bounds=_CUT
        ),
        "network between a worker and a server cut for good, so that the worker is given up": Row(
            harms.nothing, ("--epochs", 60, "--progress-timeout", 5), network=spread.cut_off, bounds=_CUT
        ),
        "a server that a worker cannot reach from the beginning, so that the others train": Row(
            harms.nothing, ("--progress-timeout", 12), network=spread.cannot_reach, scene=spread.Unreached, bounds=None
        ),
        "names of the coordinator and of a server that nobody knows at first": Row(
            harms.nothing, network=lambda run: None, scene=spread.Unresolved, bounds=_UNHARMED
        ),
        "two hosts with one name: a server with the coordinator's process id and a worker with a stranger's stopped 18 s": Row(
            harms.nothing, _COPIES, network=spread.stop_namesakes, scene=spread.Namesakes, bounds=_WOKEN
        ),
        "by IPv6, coordinator killed, another started by hand": Row(harms.coordinator_killed, by_hand=True, bind="tcp://[::1]:0"),
        "every message 200 ms late": Row(harms.nothing, ("--rounds", 30), delay_s=0.2, bounds=_UNHARMED),
        f"{churn_s:.0f} s of random kills": Row(harms.churn(churn_s), churn, bounds=None),
        f"{churn_s:.0f} s of random kills, with copies": Row(harms.churn(churn_s), (*churn, *_COPIES), bounds=None),
        f"{churn_s:.0f} s of random kills, async": Row(harms.churn(churn_s), (*churn, *_ASYNC), is_inexact=True, bounds=None),
    }


def _on_the_wire(folder: Path) -> dict[str, Row]:
    """Return rows with bad input on the wire, by a stranger to all listening processes."""
    found = {
        f"strangers: {name}": Row(harms.strangers(item), _SOCKETS, bounds=_UNHARMED, refused=item.refused)
        for name, item in ITEMS.items()
    } | {
        f"a worker that has joined: {name}": Row(
            harms.joined(deed), (*_SOCKETS, *deed.flags), bounds=_UNHARMED, refused=deed.refused
        )
        for name, deed in DEEDS.items()
    }
    again, lost, anew = (Wire(folder / name) for name in ("again", "lost", "anew"))
    unruly = Wire(folder / "unruly", is_unruly=True)
    return found | {
        "strangers: messages of members once more": Row(harms.overheard(again), _SOCKETS, again.env),
        "strangers: messages of an earlier epoch once more, and of a worker that was lost": Row(
            harms.overheard(lost, harms.a_worker_is_lost), _SOCKETS, lost.env, refused=("sender",)
        ),
        "strangers: messages of before all began anew": Row(
            harms.overheard(anew, harms.all_begin_anew, to_all=True), _SOCKETS, anew.env, refused=("run",)
        ),
        "all connections reset, again and again": Row(harms.broken_connections, _SOCKETS, bounds=_CUT),
        "messages sent twice, and after later ones": Row(harms.unruly(unruly), _SOCKETS, unruly.env, bounds=_UNHARMED),
    }


def _told_to_stop(everybody: Sequence[str]) -> dict[str, Row]:
    """Return rows of SIGTERM. A run that ends with it goes on by `--resume auto`, and its pause lasts until then."""
    late = ("--progress-timeout", 5)
    return {
        "SIGTERM of the launcher, then --resume auto": Row(harms.told_to_stop(), bounds=_STOPPED),
        "SIGTERM of the coordinator, then --resume auto": Row(harms.told_to_stop("coordinator"), bounds=_STOPPED),
        "SIGTERM of all but the launcher, then --resume auto": Row(harms.told_to_stop(*everybody), bounds=_STOPPED),
        "SIGTERM of a worker": Row(harms.tell("worker-1"), bounds=_UNHARMED),
        "SIGTERM of a server": Row(harms.tell("server-1")),
        "SIGTERM of a server, with copies": Row(harms.tell("server-1"), _COPIES),
        "the first worker comes late to its first batch": Row(harms.nothing, late, bounds=None, script=(_TO_THE_END, "late")),
    }


def _at_the_end() -> dict[str, Row]:
    """Return rows in which scripts end early, or do something after the last round. The run must end well, with the model."""

    def row(how: str, harm: Harm = harms.nothing, bounds: Bounds | None = None, flags: Sequence[object] = ()) -> Row:
        return Row(harm, flags, bounds=bounds, script=(_TO_THE_END, how))

    return {
        "a worker's script ends early": row("leave", bounds=_UNHARMED),
        "the first worker's script ends early": row("exit", bounds=_UNHARMED),
        "a worker evaluates for longer than --progress-timeout": row("evaluate", flags=("--progress-timeout", 5)),
        "a worker fails after the last round": row("raise"),
        "a worker is killed after the last round": row("kill"),
        "a server killed while a worker evaluates": row("evaluate", harms.kill_with_model("server-1")),
        "the coordinator killed while a worker evaluates": row("evaluate", harms.kill_with_model("coordinator")),
    }


def _not_finite() -> dict[str, Row]:
    """Return rows with a gradient that is NaN or infinite, once an epoch."""

    def row(how: str, harm: Harm, bounds: Bounds | None = _DEAD, fails: bool = False) -> Row:
        flags = ("--transport", "tcp", "--on-nonfinite", how)
        return Row(harm, flags, is_inexact=fails, bounds=bounds, fails=fails, script=(_NOT_FINITE,))

    return {
        "gradients not finite, skip, a worker killed": row("skip", harms.kill("worker-1")),
        "gradients not finite, allow, a worker killed": row("allow", harms.kill("worker-1")),
        "gradients not finite, fail": row("fail", harms.fails(_FAILED), None, fails=True),
    }


def measure(row: Row, expected: str, folder: Path) -> Outcome:
    """Start a run, do the harm in the middle of it, and return the outcome. `expected` is the hash of its weights."""
    flags = row.training
    if row.network is not None or row.delay_s:
        with spread.hosts(folder.with_name(f"{folder.name}-logs")) as (made, processes):
            if row.delay_s:
                spread.delay(made, processes, row.delay_s)
            near = 0 if row.delay_s else _WORKERS - 1
            run = row.scene(folder, processes, made, _SERVERS, near, _WORKERS - near, *flags)
            return _look(run, row, expected, lambda _: row.network and row.network(run))
    if row.by_hand:
        env = {**os.environ, **row.env, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with Processes(folder.with_name(f"{folder.name}-logs"), env) as processes:
            by_hand = ByHand(folder, processes, _SERVERS, _WORKERS, *flags, env=row.env, bind=row.bind)
            return _look(by_hand, row, expected)
    with harms.small_disk(folder) if row.on_small_disk else nullcontext(folder) as place:
        size = ("--workers", _WORKERS, "--servers", row.servers)
        return _look(Cluster(place, "--run-dir", place, *flags, *size, *row.script, env=row.env), row, expected)


def _look(run: Cluster, row: Row, expected: str, first: Callable[[Cluster], object] = lambda run: None) -> Outcome:
    try:
        run.until(lambda: run.rounds() > _ROUNDS or list(run.folder.glob(f"{MARK}*")), "training")
        if VARIABLE not in row.env and not row.delay_s:
            run.until(lambda: run.events("snapshot"), "snapshot")
        began, harmed = time.time(), run
        first(run)
        run = row.harm(run)
        began = harmed.harmed_at or began
        summary = run.summary() if not row.fails else {}
        if missing := sorted(set(row.refused) - set(summary.get("refused", ()))):
            return Outcome(f"nothing was refused as '{missing[0]}'; as refused counted {summary['refused']}")
    except AssertionError as error:
        return Outcome(str(error).strip().splitlines()[0])
    except (KeyError, ProcessLookupError) as error:
        return Outcome(f"the harness found no process to harm: {error}")
    finally:
        run.close()
        left = run.left_behind()
        for pid in left.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    if left:
        return Outcome(f"left behind: {', '.join(left)}")
    began = min((mark.stat().st_mtime for mark in run.folder.glob(f"{MARK}*")), default=began)

    def since(at: float) -> float:
        """Return the seconds from `began` to `at`, also if the clock was moved by an hour in between."""
        return (at - began + _HOUR_S / 2) % _HOUR_S - _HOUR_S / 2

    events = [(since(at), event) for _, at, event in run.read(RunLogReader.events)]
    committed = run.read(RunLogReader.rounds)
    times = [0.0, *(at for committed_ in committed if (at := since(committed_.at)) > 0)]
    return Outcome(
        same=row.is_inexact or summary["weights_sha256"] == expected,
        exact=run.is_exact() and (row.fails or len(committed) == summary.get("merges", summary["rounds"])),
        noticed_s=min((at for at, event in events if at >= 0 and event.kind in _NOTICED), default=None),
        pause_s=max((b - a for a, b in itertools.pairwise(times)), default=0.0),
        rounds=sum(event.data["rounds"] for _, event in events if event.kind == "rolled back"),
        recomputed=summary.get("micro_batches_recomputed", 0),
    )


def line(name: str, outcome: Outcome, is_inexact: bool = False, bounds: Bounds | None = _DEAD) -> str:
    """Return a row of the table."""
    noticed = "" if outcome.noticed_s is None else f"{outcome.noticed_s:.1f}"
    if outcome.problem:
        return f"| {name} | **no**: {outcome.problem.replace('|', '/')} | | | | | | | |"
    finished, same, exact = ("yes" if good else "**no**" for good in (True, outcome.same, outcome.exact))
    cells = (
        name,
        finished,
        "n/a" if is_inexact else same,
        exact,
        "n/a" if bounds is None else f"**no**: {broken}" if (broken := bounds.broken(outcome)) else "yes",
        noticed,
        f"{outcome.pause_s:.1f}",
        outcome.rounds,
        outcome.recomputed,
    )
    return f"| {' | '.join(map(str, cells))} |"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--row", "wanted", multiple=True, help="Only rows whose name has this in it; repeatable. By default all.")
@click.option("--quick", is_flag=True, help="A few rows only.")
@click.option("--times", type=click.IntRange(min=1), default=1, show_default=True, help="Runs of each row.")
@click.option(
    "--churn", "churn_s", type=click.FloatRange(1, 600), default=30.0, show_default=True, help="Seconds of random kills."
)
@click.option("--out", type=click.Path(path_type=Path), help="File for the table, too.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder, which is made, in which the runs are to stay.")
def cli(wanted: Sequence[str], quick: bool, times: int, churn_s: float, out: Path | None, keep: Path | None) -> None:
    """Do harm to real runs, and compare their weights and ledgers with those of an undisturbed run.

    The exit code is 1 if a row does not hold. Seconds out of bounds are only shown, because a busy machine is slow.
    """
    lines = [f"| {' | '.join(HEADS)} |", f"| {' | '.join(['---'] * 5 + ['---:'] * 4)} |"]
    expected: dict[tuple[object, ...], str] = {}
    failed = False
    network.remove_stale()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if keep is None else keep.resolve()
        folder.mkdir(exist_ok=keep is None)
        tables = [rows(churn_s, folder / f"time-{time_}") for time_ in range(times)]  # each repeat begins with an empty folder
        table = tables[0]
        unknown = [part for part in wanted if not any(part in name for name in table)]
        if unknown:
            raise click.UsageError(f"there is no row '{unknown[0]}'; there are {', '.join(table)}.")
        chosen = {
            n: row for n, row in table.items() if (not quick or n in _QUICK) and (not wanted or any(w in n for w in wanted))
        }
        print("\n".join(lines), flush=True)
        for number, (name, row) in enumerate(chosen.items()):
            key = (*row.flags, *row.script)
            if key not in expected and not row.is_inexact:
                place = folder / f"quiet-{number}"
                expected[key] = str(Cluster(place, "--run-dir", place, *row.training, *row.script).summary()["weights_sha256"])
            for time_, again in enumerate(tables):
                try:
                    outcome = measure(again[name], expected.get(key, ""), folder / f"{number}-{time_}")
                except (PsError, UsageError) as error:
                    outcome = Outcome(f"not possible here: {error}")
                failed |= not outcome.holds
                lines.append(line(name, outcome, row.is_inexact, row.bounds))
                print(lines[-1], flush=True)
    if out is not None:
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(failed)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # all that was started is ended, and all that was made is removed
    cli()
