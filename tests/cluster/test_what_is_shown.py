"""Progress in lines and pictures, and the sentence about a child that failed."""

from __future__ import annotations

import io
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from roundtable.cluster.process.children import Child, root_cause
from roundtable.cluster.run.console import Screen
from roundtable.cluster.run.display import line, picture
from roundtable.cluster.run.progress import Progress, Tracker
from roundtable.cluster.run.script_output import ScriptOutput
from roundtable.cluster.run.summary import results_line, summary_lines
from roundtable.common.config.batch_plan import make_segment
from roundtable.common.config.settings import Settings
from roundtable.common.policies import load
from roundtable.common.storage import disk_alarm
from roundtable.common.storage.event_log import ContributionRow, Event, RoundRow, RunLog, StatusRow
from roundtable.ps.coordinator.recovery import RunHeader, StateWriter, restore
from roundtable.ps.coordinator.state.ledger import Ledger
from roundtable.ps.coordinator.state.membership import Membership

ROWS = [
    StatusRow("server-0", "waiting", 4, ""),
    StatusRow("worker-0", "waiting", 4, "worker-2, worker-3 and 1 more", 80.0),
    StatusRow("worker-1", "waiting", 4, "worker-2, worker-3 and 1 more", 70.0),
    StatusRow("worker-2", "starting", -1, ""),
]
PROGRESS = Progress(
    4,
    10,
    256,
    123.4,
    0.98765,
    0.5,
    ROWS,
    epoch=1,
    epochs=2,
    left_s=9.2,
    waits_s={"worker-0": 3.0, "worker-1": 8.0},
    checkpoint=(3, 12.0),
)  # fmt: skip


def drawn(progress: Progress, elapsed_s: float | None = None, height: int = 24) -> list[str]:
    """The lines of the picture on a terminal of 80 columns."""
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as capture:
        console.print(picture(progress, elapsed_s, height))
    return [text.rstrip() for text in capture.get().splitlines()]


def test_a_line_of_progress_has_rounds_time_speed_loss_accuracy_and_who_waits_for_whom() -> None:
    waits = "worker-0 and worker-1 wait for worker-2, worker-3 and 1 more"
    numbers = "123 samples/s, elapsed 1:02, left 0:09, loss 0.9877, accuracy 50.0%"
    assert line(PROGRESS, 62.0) == f"round 4/10, epoch 1/2, {numbers}; {waits}"
    assert line(Progress(processes=ROWS)).startswith("starting, 4 processes connected")


def test_a_picture_of_few_workers_has_a_line_for_each_and_their_speeds_add_up() -> None:
    assert drawn(PROGRESS, 62.0) == [
        " 40% |##############                      | round 4/10  epoch 1/2",
        " 123 samples/s   elapsed 1:02   left 0:09   loss 0.9877   accuracy 50.0%",
        " worker-0   waiting 3 s for worker-2, worker-3 and 1 more",
        " worker-1   waiting 8 s for worker-2, worker-3 and 1 more",
        " worker-2   starting",
        " servers    1 ok   checkpoint of round 3, 12 s ago",
    ]
    rows = [StatusRow(name, "computing", 4, "") for name in ("worker-0", "worker-1")]
    busy = replace(PROGRESS, processes=rows, speeds={"worker-0": 90.0, "worker-1": 33.4})
    assert drawn(busy)[2:] == [
        " worker-0   computing  ###############.....       90/s  73% of the work",
        " worker-1   computing  #####...............       33/s  27% of the work",
    ]


@pytest.mark.parametrize("height", [24, 9])
def test_a_picture_of_twelve_workers_fits_80_columns_and_names_the_slowest_and_those_that_wait(height: int) -> None:
    rows = [StatusRow(f"worker-{n}", "computing", 9, "") for n in range(10)]
    rows += [StatusRow("worker-10", "waiting", 9, "server-1"), StatusRow("worker-11", "starting", -1, "")]
    speeds = {f"worker-{n}": 640.0 + n for n in range(10)} | {"worker-9": 410.0, "worker-10": 100.0}
    progress = Progress(
        1684, 9375, 100, sum(speeds.values()), 0.7, None, [*rows, ROWS[0]], speeds=speeds, waits_s={"worker-10": 8.0}
    )
    lines = drawn(progress, 252.0, height)
    assert len(lines) <= height and max(map(len, lines)) <= 80
    assert " 10 workers ok   median 644/s   slowest worker-9 410/s" in lines
    if height == 24:
        assert " worker-10  waiting 8 s for server-1" in lines and " worker-11  starting" in lines


def test_a_short_wait_is_not_told() -> None:
    rows = [StatusRow("worker-0", "waiting", 4, "server-0")]
    assert "wait" not in line(Progress(4, 10, processes=rows, waits_s={"worker-0": 1.0}))


def test_an_alarm_that_the_log_cannot_tell_is_shown_for_as_long_as_it_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, now = io.StringIO(), [0.0]
    with Screen(Console(file=out, width=100), tmp_path / "none", lambda: now[0]) as screen:
        monkeypatch.setenv(*next(iter(screen.alarm.env.items())))
        for text in ("", "the disk is full.", "the disk is full.", ""):
            disk_alarm.raise_alarm(text)
            for _ in range(12):
                now[0] += 0.5
                screen.update()
            assert [str(part) for part in picture(screen.progress).renderables][1:] == [f"warning: {text}"] * bool(text)
    starting, told = "starting, 0 processes connected, elapsed 0:", "warning: the disk is full."
    assert out.getvalue().splitlines() == [
        f"{starting}05", told, f"{starting}10; {told}", f"{starting}15; {told}", f"{starting}20",
    ]  # fmt: skip


def test_progress_is_read_from_the_log_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite"
    tracker = Tracker(path)
    assert tracker.look() == Progress()
    log = RunLog(path)
    log.event(Event("plan", "coordinator", {"rounds": 3}))
    log.round(RoundRow(0, 0, 64, 4, 0, {"loss": 2.0}))
    log.flush()
    first = tracker.look()
    assert (first.rounds, first.total, first.samples, first.loss) == (1, 3, 64, 2.0)
    log.round(RoundRow(1, 0, 192, 4, 0, {"loss": 1.0}))
    log.metric(1, "worker-0", "accuracy", 0.75)
    log.status(ROWS[1])
    log.close()
    second = tracker.look()
    assert (second.rounds, second.samples, second.loss, second.accuracy) == (2, 256, 1.25, 0.75)
    assert [row.process for row in second.processes] == ["worker-0"]


def test_rounds_that_are_done_again_are_not_counted_twice_and_what_happened_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite"
    tracker, log = Tracker(path), RunLog(path)
    log.event(Event("plan", "coordinator", {"rounds": 9}))
    for number in range(5):
        log.round(RoundRow(number, 0, 64, 4, 0, {"loss": 1.0}))
    log.event(Event("stopped", "coordinator", {"ok": False, "reason": "all restart.", "restart": True}))
    settings = Settings()
    policy = load(settings)
    head, membership = RunHeader("r.1", 1, "", settings), Membership(settings, policy, "r.1", 0.0)
    ledger = Ledger(settings, policy)
    ledger.plan(make_segment(before=None, samples=576, global_batch=64, micro_batch=16, epochs=1, round_limit=None))
    StateWriter().write(log, head, membership, ledger)
    log.close()
    assert tracker.look().rounds == 5
    restore(path, upto=2)
    log = RunLog(path)
    log.round(RoundRow(2, 0, 64, 4, 0, {"loss": 1.0}))
    log.close()
    found = tracker.look()
    assert (found.rounds, found.samples) == (3, 192)
    assert found.news == ["resumed at round 2, redoing 3 rounds."]


def test_where_there_is_no_terminal_a_line_comes_every_few_seconds_without_control_characters(tmp_path: Path) -> None:
    out, now = io.StringIO(), [0.0]
    with Screen(Console(file=out), tmp_path / "none", lambda: now[0]) as screen:
        for _ in range(100):
            now[0] += 0.25
            screen.update()
    lines = out.getvalue().splitlines()
    assert 4 <= len(lines) <= 5 and all(one.startswith("starting, 0 processes connected, elapsed 0:") for one in lines)


def test_plain_lines_become_fewer_after_a_minute_and_quiet_and_off_show_none(tmp_path: Path) -> None:
    def shown(**kinds: Any) -> list[str]:
        out, now = io.StringIO(), [0.0]
        with Screen(Console(file=out), tmp_path / "none", lambda: now[0], **kinds) as screen:
            for _ in range(400):
                now[0] += 0.5
                screen.update()
            screen.say("news")
            screen.say("warning: careful")
            screen.report("done")
        return out.getvalue().splitlines()

    lines = shown(mode="plain")
    assert len([one for one in lines if one.startswith("starting")]) in range(15, 18)
    assert shown(mode="off") == ["news", "warning: careful", "done"] and shown(quiet=True) == ["warning: careful", "done"]


def test_a_summary_tells_results_and_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    summary = {"rounds": 5, "samples": 320, "seconds": 2.0, "samples_per_second": 160.0, "loss": 0.5, "accuracy": 0.25,
               "dropped": 3, "weights_sha256": "0123456789abcdef"}  # fmt: skip
    assert summary_lines(summary, tmp_path) == [
        "done: accuracy 25.0%, loss 0.5000, 5 rounds, 320 samples in 2.0 s (160 samples/s)",
        "3 micro-batches dropped",
        "weights_sha256 0123456789ab",
        f"the model is in {tmp_path / 'model.safetensors'}",
    ]


def test_a_summary_tells_what_its_numbers_are_of() -> None:
    summary = {
        "rounds": 40, "merges": 1, "samples": 320, "seconds": 2.0,
        "loss": 0.5, "loss_of": "training samples of rounds 20 to 39",
        "accuracy": 0.25, "accuracy_of": "50 held-out samples, after round 40",
    }  # fmt: skip
    assert results_line(summary) == (
        "accuracy 25.0% (50 held-out samples, after round 40), loss 0.5000 (training samples of rounds 20 to 39), "
        "40 rounds in 1 merge, 320 samples in 2.0 s"
    )


def test_a_run_that_trains_nothing_is_told_as_that() -> None:
    assert results_line({"rounds": 0, "samples": 0, "seconds": 0.0, "weights_sha256": None}) == "no model was trained"
    rows = [StatusRow("server-0", "waiting", -1, ""), StatusRow("worker-0", "computing", -1, "")]
    assert line(Progress(processes=rows)) == "at work, 2 processes connected"


def test_time_left_speeds_and_the_epoch_are_read_from_the_log(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "events.sqlite")
    log.event(Event("plan", "coordinator", {"rounds": 40, "epochs": 4}))
    for number in range(20):
        log.round(RoundRow(number, number // 10, 64, 4, 0, {}))
        log.contribution(ContributionRow(number, 0, 3, "worker-0", 48, "committed", None, 3))
        log.contribution(ContributionRow(number, 3, 4, "worker-10", 16, "committed", None, 1))
        log.contribution(ContributionRow(number, 3, 4, "worker-2", 16, "duplicate", None, 1))
    log.event(Event("checkpoint", "coordinator", {"round": 10, "bytes": 1}))
    for name in ("worker-10", "worker-2", "worker-0"):
        log.status(StatusRow(name, "waiting", 4, "server-0" if name == "worker-2" else ""))
    log.flush()
    tracker, now = Tracker(tmp_path / "events.sqlite"), time.time()
    tracker.look(now)
    found = tracker.look(now + 4.0)
    log.close()
    assert (found.epoch, found.epochs, [row.process for row in found.processes]) == (2, 4, ["worker-0", "worker-2", "worker-10"])
    assert found.left_s is not None and 3.5 < found.left_s < 5.0  # 20 rounds were done in 4 s, and 20 are left
    assert found.speeds.keys() == {"worker-0", "worker-10"}
    assert sum(found.speeds.values()) == pytest.approx(found.samples_per_second)
    assert found.speeds["worker-0"] == pytest.approx(3 * found.speeds["worker-10"])
    assert found.waits_s == {"worker-2": 4.0} and found.checkpoint is not None and found.checkpoint[0] == 10


def test_after_a_resume_time_left_and_speed_are_of_the_part_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    log = RunLog(tmp_path / "events.sqlite")
    log.event(Event("plan", "coordinator", {"rounds": 40, "epochs": 4}))
    for number in range(20):
        log.round(RoundRow(number, 0, 64, 4, 0, {}))
    now[0] += 3.0
    log.event(Event("started", "coordinator", {}))
    for number in range(20, 31):
        now[0] += 1.0
        log.round(RoundRow(number, 1, 64, 4, 0, {}))
    log.close()
    found = Tracker(tmp_path / "events.sqlite").look(now[0])
    assert (found.rounds, found.epoch) == (31, 2)
    assert found.left_s is not None and 8.0 <= found.left_s < 9.0  # a round a second, and 9 are left
    assert found.samples_per_second == pytest.approx(64.0, rel=0.25)


def test_all_that_a_script_has_printed_is_shown_in_the_end(tmp_path: Path) -> None:
    (tmp_path / "worker-0.log").touch()
    output = ScriptOutput(tmp_path)
    (tmp_path / "worker-0.log").write_text("much\n" * 50_000 + "the last")
    assert len(output.lines()) < 50_000
    assert output.lines(at_end=True)[-1] == "the last"


def test_what_worker_0_prints_is_shown_without_our_own_log_and_tracebacks(tmp_path: Path) -> None:
    (tmp_path / "worker-0.log").write_text("of an earlier run\n")
    one, all_ = ScriptOutput(tmp_path), ScriptOutput(tmp_path, everybody=True)
    ours = "2026-11-30 06:57:52,001 INFO roundtable.worker.run: using shared memory with server-0\n"
    error = "Traceback (most recent call last):\n  File x\nValueError: no\nerror: ValueError: no\n"
    with (tmp_path / "worker-0.log").open("a") as log:
        log.write(f"{ours}accuracy 98%\n 1%|#\r 2%|##\n{error}not the end")
    (tmp_path / "worker-1.log").write_text("another\n")
    assert one.lines() == ["accuracy 98%", " 2%|##"] and one.lines() == []
    assert one.lines(at_end=True) == ["not the end"]
    assert all_.lines() == ["worker-0: accuracy 98%", "worker-0:  2%|##", "worker-1: another"]


def child(folder: Path, name: str, code: int, log: str, ended_at: float = 0.0) -> Child:
    path = folder / f"{name}.log"
    path.write_text(log)
    return Child(name, path, subprocess.Popen(["true"]), code, ended_at)


@pytest.mark.parametrize(
    ("code", "log", "sentence"),
    [
        (-9, "error: not this\n", "worker-0 was killed by signal 9 (SIGKILL)"),
        (-11, "", "worker-0 was killed by signal 11 (SIGSEGV)"),
        (1, "Traceback\nerror: ValueError: no.\nbye\n", "worker-0 failed: ValueError: no"),
        (2, "usage\n\n", "worker-0 failed with exit code 2: usage"),
        (3, "", "worker-0 failed with exit code 3 and no output"),
    ],
)
def test_the_end_of_a_child_is_one_sentence(tmp_path: Path, code: int, log: str, sentence: str) -> None:
    one = child(tmp_path, "worker-0", code, log)
    one.popen.wait()
    assert one.describe_end() == f"{sentence}; its log is {one.log}."


def test_of_a_worker_that_the_coordinator_tells_of_the_own_word_and_log_are_told(tmp_path: Path) -> None:
    one = child(tmp_path, "coordinator", 1, "error: worker-1 failed: UsageError: no\n")
    one.popen.wait()
    log = tmp_path / "worker-1.log"
    assert one.describe_end() == f"worker-1 failed: UsageError: no; its log is {log}."
    log.write_text("error: no such data.\n")
    assert one.describe_end() == f"worker-1 failed: no such data; its log is {log}."


def test_the_failure_that_brought_about_the_others_is_told(tmp_path: Path) -> None:
    told = child(tmp_path, "worker-1", 1, "error: stopped because worker-0 failed\n", 1.0)
    reported = child(tmp_path, "coordinator", 1, "error: worker-0 failed: ValueError\n", 2.0)
    own = child(tmp_path, "worker-0", 1, "error: ValueError: no\n", 3.0)
    killed = child(tmp_path, "server-0", -9, "", 3.0)
    for one in (told, reported, own, killed):
        one.popen.wait()
    assert root_cause([told, reported]) is reported
    assert root_cause([told, reported, own]) is own
    assert root_cause([told, reported, own, killed]) is killed


def test_a_summary_tells_how_many_samples_its_seconds_are_for_after_a_resume() -> None:
    summary = {"rounds": 9, "samples": 320, "seconds": 2.0, "weights_sha256": "ab", "samples_before_resume": 200}
    assert results_line(summary) == "9 rounds, 320 samples, 120 of them since it was resumed, in 2.0 s"
