"""After every run under every policy, each sample of the epochs asked for is in exactly one update, or reported as dropped.

Real clusters with a slow worker, an epoch's short last batch and a short last micro-batch; the ledger is the event log's.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from roundtable.common.storage.event_log import FILE_NAME, ContributionRow, RunLogReader

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "exactness" / "train_exact.py"
SAMPLES, EPOCHS, ROUNDS = 1000, 2, 18  # of 120 samples, the ninth of each epoch of 40
MICRO_BATCHES = [8, 8, 8, 8, 8, 8, 8, 8, 3] * EPOCHS

Launch = Callable[..., dict[str, Any]]


def contributions(folder: Path) -> list[ContributionRow]:
    with contextlib.closing(RunLogReader(folder / FILE_NAME)) as log:
        return log.contributions()


def train(launch: Launch, *flags: object) -> dict[str, Any]:
    cluster = ("--workers", 3, "--servers", 2)
    return launch(*cluster, *flags, SCRIPT, "--", "momentum", "--epochs", EPOCHS, "--slow", 1)


@pytest.mark.parametrize("flags", ["sync", "backup --backup-micro-batches 2", "ssp --max-staleness 1", "async --staleness-lr"])
# I7
def test_every_micro_batch_is_in_one_update_or_reported_dropped(flags: str, launch: Launch, tmp_path: Path) -> None:
    policy = flags.split()[0]
    summary = train(launch, "--policy", *flags.split())
    rows = contributions(tmp_path / "run")
    counted = Counter((row.round, k) for row in rows if row.outcome == "committed" for k in range(row.lo, row.hi))
    dropped = Counter((row.round, row.lo) for row in rows if row.outcome == "dropped")
    planned = {(round_, k) for round_, count in enumerate(MICRO_BATCHES) for k in range(count)}
    assert set(counted.values()) == {1}
    assert set(counted) | set(dropped) == planned and set(dropped.values()) <= {1} and not set(counted) & set(dropped)
    assert summary["rounds"] == ROUNDS
    assert summary["micro_batches_committed"] == len(counted)
    assert summary["micro_batches_committed"] + summary["dropped"] == len(planned)
    assert summary["samples"] + summary["samples_dropped"] == SAMPLES * EPOCHS
    assert sum(row.samples for row in rows if row.outcome == "committed") == summary["samples"]
    if policy == "backup":
        assert all(sum(r == round_ for r, _ in counted) >= MICRO_BATCHES[round_] - 2 for round_ in range(ROUNDS))
    else:
        assert set(counted) == planned and summary["dropped"] == 0
    if policy in ("ssp", "async"):
        assert sum(summary["staleness"].values()) == len(planned)
        assert any(int(staleness) > 0 for staleness in summary["staleness"])


@pytest.mark.parametrize(("flags", "merges"), [("local --local-steps 4 --local-after 3", 7), ("average", 1)])
def test_replicas_that_step_apart_use_every_sample_once(flags: str, merges: int, launch: Launch, tmp_path: Path) -> None:
    summary = train(launch, "--policy", *flags.split())
    rows = contributions(tmp_path / "run")
    assert sorted((row.round, row.lo) for row in rows) == [(m, w) for m in range(merges) for w in range(3)]
    assert {row.outcome for row in rows} == {"committed"}
    assert sum(row.samples for row in rows) == summary["samples"] == SAMPLES * EPOCHS
    assert summary["micro_batches_committed"] == sum(MICRO_BATCHES)
    assert summary["merges"] == merges and summary["dropped"] == 0
    assert (summary["rounds"], summary["epochs"]) == (ROUNDS, EPOCHS)


@pytest.mark.parametrize("bound", [0, 2])
def test_under_ssp_nobody_leads_by_more_than_the_bound(bound: int, launch: Launch, tmp_path: Path) -> None:
    train(launch, "--policy", "ssp", "--max-staleness", bound)
    outstanding = {(round_, k) for round_, count in enumerate(MICRO_BATCHES) for k in range(count)}
    leads = []
    for row in contributions(tmp_path / "run"):  # in the order in which server 0 applied them
        if row.outcome == "committed":
            leads.append(row.round - min(outstanding)[0])
            outstanding.remove((row.round, row.lo))
    assert max(leads) == bound
    assert not outstanding


def test_more_workers_than_micro_batches_leave_some_idle(launch: Launch) -> None:
    summary = launch("--workers", 4, "--data", "digits", "--global-batch", 32, "--rounds", 8)
    assert (summary["rounds"], summary["samples"], summary["micro_batches_committed"]) == (8, 256, 16)


@pytest.mark.parametrize(("flags", "within"), [("ssp --max-staleness 1", 1e-5), ("async --staleness-lr", 0.06)])
def test_weights_move_as_far_as_the_schedule_plans_and_counters_as_often(
    flags: str, within: float, launch: Launch, tmp_path: Path
) -> None:
    summary = launch("--workers", 3, "--servers", 2, "--policy", *flags.split(), Path(__file__).with_name("train_drift.py"))
    model = load_file(tmp_path / "run" / "model.safetensors")
    rounds, micro_batches = 32, 128
    planned = sum(0.1 * (1 - number / rounds) for number in range(rounds))
    assert -model["drift"].item() == pytest.approx(planned, rel=within)
    assert model["layers.1.num_batches_tracked"].item() == summary["micro_batches_committed"] == micro_batches
    assert summary["rounds"] == rounds
