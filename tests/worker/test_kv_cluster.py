"""The key-value client with real processes; what is claimed is asserted in the script that the workers run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from roundtable.common.storage.event_log import RunLogReader


def test_pushes_of_all_workers_add_up_over_two_servers_and_what_cannot_be_is_refused_in_a_sentence(
    launch: Any, tmp_path: Path
) -> None:
    summary = launch("--workers", 3, "--servers", 2, Path(__file__).with_name("kv_script.py"))
    assert summary["rounds"] == 0 and summary["weights_sha256"] is None
    assert len(RunLogReader(tmp_path / "run" / "events.sqlite").metrics("passed")) == 3
    said = dict(
        line.split(": ", 1) for line in (tmp_path / "run" / "logs" / "worker-0.log").read_text().splitlines() if ": " in line
    )
    assert "was waited for before" in said["waited twice"] and "no push or pull has timestamp" in said["never given"]
    assert said["no such key"].startswith("nothing was pushed to key 'nothing'")
    assert "holds float32, but was pulled into int32" in said["pulled into another type"]
    assert "holds 6 x float32; worker-0 added 6 x float64" in said["added another type"]
    assert "holds 6 elements, but was pulled into 5" in said["pulled too few"] and "6 elements" in said["pulled too many"]
    assert "holds 2500000 elements" in said["pulled the first block"] and "2500000" in said["added the first block"]
