"""Real runs with sharded layers: what three servers saved is one file, and any other number of servers goes on from it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_going_on import launch

from benchmarks.live import Cluster
from roundtable.common.storage.event_log import RunLogReader

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(240)]

Start = Callable[..., Cluster]
SCRIPT = Path(__file__).with_name("train_rows.py")
ROUNDS, EARLY = 10, 5


def losses(folder: Path) -> list[float]:
    with contextlib.closing(RunLogReader(folder / "events.sqlite")) as log:
        return [row.metrics["loss"] for row in log.rounds()]


def test_shards_of_three_servers_go_on_with_any_other_number_of_them(cluster: Start, resumed: Start, tmp_path: Path) -> None:
    cluster("--workers", 1, "--servers", 3, SCRIPT, name="whole").summary()
    expected = losses(tmp_path / "whole")
    assert len(expected) == ROUNDS
    cluster("--workers", 1, "--servers", 3, "--rounds", EARLY, SCRIPT, name="early").summary()
    assert losses(tmp_path / "early") == expected[:EARLY]
    out = tmp_path / "model.safetensors"
    assert launch("checkpoint", "export", tmp_path / "early", "--out", out)[0] == 0
    found, trained = load_file(out), load_file(tmp_path / "early" / "model.safetensors")
    assert found.keys() == trained.keys() > {"items.weight", "middle.weight", "head.weight", "head.bias"}
    assert all(torch.equal(found[name], trained[name]) for name in found)
    final = load_file(tmp_path / "whole" / "model.safetensors")
    for servers in (1, 2, 5):
        name = f"on-{servers}"
        shutil.copytree(tmp_path / "early", tmp_path / name)
        summary = resumed("--servers", servers, "--rounds", ROUNDS, name=name).summary()
        assert (summary["servers"], summary["rounds"]) == (servers, ROUNDS)
        assert losses(tmp_path / name) == pytest.approx(expected, rel=0, abs=1e-6)
        for key, tensor in load_file(tmp_path / name / "model.safetensors").items():
            torch.testing.assert_close(tensor, final[key], rtol=0, atol=1e-5)
