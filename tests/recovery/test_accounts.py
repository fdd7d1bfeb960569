"""Real runs in which a worker, two servers and the coordinator are killed: the weights themselves say, on each server by itself,
that every sample is in one update an epoch, or was dropped as the ledger says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_accounts import EPOCHS, GLOBAL_BATCH, MICRO_BATCH, SAMPLES

from benchmarks.live import Cluster
from roundtable.common.runtime.failpoints import VARIABLE
from roundtable.common.storage.event_log import RunLogReader
from roundtable.common.storage.run_files import MODEL_FILE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

KILLS = "worker-1:pushing:30:kill;server-1:applied:60:kill;coordinator:reported:90:kill;server-2:aggregating:120:kill"


@pytest.mark.parametrize(
    "policy", ["sync", pytest.param("backup", marks=pytest.mark.long), pytest.param("ssp", marks=pytest.mark.long), "async"]
)
def test_whoever_is_killed_each_server_has_counted_every_sample_once_an_epoch(
    policy: str, cluster: Callable[..., Cluster]
) -> None:
    script = Path(__file__).with_name("train_accounts.py")
    run = cluster("--servers", 3, "--policy", policy, "--checkpoint-every", 0.2, script, env={VARIABLE: KILLS})
    summary = run.summary()
    assert len(list(run.folder.glob("failpoint-*"))) == 4 and len(run.events("restarted")) == 2
    expected = torch.zeros(SAMPLES, dtype=torch.float64)
    sizes = {row.round: row.samples for row in run.read(RunLogReader.rounds)}
    committed = [row for row in run.read(RunLogReader.contributions) if row.outcome == "committed"]
    for row in committed:
        start = row.round * GLOBAL_BATCH % SAMPLES
        expected[start + row.lo * MICRO_BATCH : start + row.hi * MICRO_BATCH] += 1 / sizes[row.round]
    if policy != "backup":
        assert summary["dropped"] == 0
        torch.testing.assert_close(expected, torch.full_like(expected, EPOCHS / GLOBAL_BATCH))
    accounts = load_file(run.folder / MODEL_FILE)
    assert len(accounts) == 3
    for account in accounts.values():
        torch.testing.assert_close(account.double(), expected[:, None].expand(-1, 16), rtol=1e-5, atol=0.0)
