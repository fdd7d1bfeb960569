"""The benchmarks run, what they write is there, and their arithmetic is right. Nothing here depends on how long things take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are not installed
from benchmarks import merging, report
from benchmarks.measure import Measurement, step_durations
from benchmarks.report import Result, Results
from benchmarks.systems import names, parse_entry
from benchmarks.workloads import WORKLOADS
from common.errors import UsageError

ROOT = Path(__file__).parents[2]


def measurement(ms: float, loss: float = 2.0, other: float | None = None) -> Measurement:
    losses = [loss, loss if other is None else other]
    return Measurement([ms / 1000] * 3, 0.5, 100.0, losses, 3.0, 0.0)


def results(*runs: tuple[str, int, Measurement | None]) -> Results:
    return Results(
        {}, [Result("cnn", system, repeat, measured, "" if measured else "it broke.") for system, repeat, measured in runs]
    )


def test_a_quick_run_writes_table_plot_and_json_and_we_train_to_ddps_loss(tmp_path: Path) -> None:
    systems = [part for name in ("independent", "ddp", "ours") for part in ("--system", name)]
    command = [sys.executable, "-m", "benchmarks", "--quick", "--model", "cnn", *systems, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    logs = "".join(f"\n--- {log}\n{log.read_text()[-1500:]}" for log in tmp_path.glob("jobs/*/logs/*"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    measured = {run["system"]: run["measured"] for run in json.loads((tmp_path / "results.json").read_text())["runs"]}
    assert set(measured) == {"independent", "ddp", "ours"}
    assert all(len(m["step_s"]) == 3 and m["memory_mb"] > 0 for m in measured.values())
    read = report.read_results(tmp_path)
    assert report.same_loss(read.of("cnn", "ours"), read.of("cnn", "ddp")) is True
    assert report.same_loss(read.of("cnn", "independent"), read.of("cnn", "ddp")) is False
    assert (tmp_path / "results.md").read_text().count("| cnn") == 3
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_ratios_compare_repeat_by_repeat() -> None:
    found = report.ratios({0: measurement(20), 1: measurement(90), 3: measurement(1)}, {0: measurement(10), 1: measurement(30)})
    assert found is not None
    assert (found.median, found.least, found.largest) == pytest.approx((2.5, 2.0, 3.0))
    assert report.ratios({0: measurement(1)}, {}) is None


def test_a_loss_is_judged_by_how_far_it_moved() -> None:
    ddp = {0: measurement(1, loss=2.9)}  # from 3.0
    assert report.same_loss({0: measurement(1, loss=2.9005)}, ddp) is True
    assert report.same_loss({0: measurement(1, loss=2.9), 1: measurement(1, loss=2.902)}, ddp) is False
    assert report.same_loss({0: measurement(1, loss=2.8, other=3.0)}, ddp) is False  # though the mean is right
    assert report.same_loss({0: measurement(1)}, {}) is None


def test_the_table_marks_other_losses_and_says_what_failed(tmp_path: Path) -> None:
    ran = results(
        ("ddp", 0, measurement(10)), ("ddp", 1, measurement(20)), ("ours", 0, measurement(5, loss=2.5)),
        ("ours", 1, measurement(20)), ("rpc", 0, None), ("rpc", 1, None),
    )  # fmt: skip
    lines = report.to_markdown(ran).splitlines()
    assert [cell.strip() for cell in lines[3].split("|")[2:5]] == ["ours", "12.5 (5.0..20.0)", "0.75 (0.50..1.00)"]
    assert "**no**" in lines[3] and "yes" in lines[2]
    assert "failed" in lines[4] and "- cnn rpc, repeat 2, failed: it broke." in lines
    report.write_results(ran, tmp_path)
    assert report.to_markdown(report.read_results(tmp_path)) == report.to_markdown(ran)
    assert len([path for path in report.write_report(ran, tmp_path) if path.stat().st_size]) == 2


def test_a_report_without_a_baseline_or_without_any_success_can_be_made(tmp_path: Path) -> None:
    for ran in (results(("ours", 0, measurement(5))), results(("ddp", 0, None))):
        assert report.write_report(ran, tmp_path)


def test_steps_that_end_at_once_share_their_time() -> None:
    assert step_durations([(2, 10.0), (3, 11.0), (5, 12.0)]) == [1.0, 0.5, 0.5]


def test_systems_are_read_with_names_and_flags() -> None:
    assert {"independent", "ddp", "zero", "rpc", "ours"} == set(names())
    assert parse_entry("ddp").name == "ddp"
    entry = parse_entry("view=ddp --view")
    assert (entry.name, entry.system, entry.flags) == ("view", "ddp", ("--view",))
    entry = parse_entry("ours --servers=1 --policy async")
    assert (entry.name, entry.flags) == ("ours --servers=1 --policy async", ("--servers=1", "--policy", "async"))
    for wrong in ("", "x=", "horovod", "ddp --veiw", "ours 'x"):
        with pytest.raises(UsageError, match=r"^[^\n]+\.$"):
            parse_entry(wrong)


def test_systems_that_send_whole_tables_are_left_out_where_gradients_are_sparse() -> None:
    left_out = [text for text in ("zero", "rpc", "fp16=ddp --fp16") if parse_entry(text).refuses(WORKLOADS["widedeep"])]
    assert left_out == ["zero", "rpc", "fp16=ddp --fp16"]
    assert not any(parse_entry(text).refuses(WORKLOADS["widedeep"]) for text in ("ddp", "ours", "independent"))
    assert not any(parse_entry(text).refuses(WORKLOADS["cnn"]) for text in names())


@pytest.mark.parametrize(
    ("name", "least", "most"), [("mlp", 19e6, 21e6), ("alexnet", 61e6, 61.2e6), ("cnn", 0.5e6, 0.7e6), ("widedeep", 34e6, 35e6)]
)
def test_models_have_their_sizes_and_data_are_always_the_same(name: str, least: float, most: float) -> None:
    workload = WORKLOADS[name]
    a, b = workload.model(), workload.model()
    assert least <= sum(p.numel() for p in a.parameters()) <= most
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    x, y = workload.dataset(2).tensors
    assert torch.equal(x, workload.dataset(2).tensors[0])
    assert workload.loss(a, x[:2], y[:2]).isfinite()


def test_a_handful_of_simulated_workers_make_a_table_of_what_a_round_and_a_connection_cost() -> None:
    command = [sys.executable, "-m", "benchmarks.connections", "--workers", "1", "--workers", "5", "--pushes", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == ["1", "5"]
    assert all(float(row[1].split()[0]) > 0 and float(row[2]) > 0 and float(row[6]) > 0 for row in rows[2:])
    assert rows[2][7:9] == ["", ""] and all(rows[3])


def test_the_table_of_merges_has_a_row_for_each_case_and_a_column_for_each_experiment() -> None:
    columns = [("mlp", {"sync": [0.96, 0.98], "parts": [1.0, 3.0]}), ("cnn", {"sync": [0.9], "local": [0.5, 0.5]})]
    assert merging.to_markdown(columns).splitlines() == [
        "|  | mlp | cnn |",
        "| --- | ---: | ---: |",
        "| sync | 97.0 ± 1.4 | 90.0 |",
        "| parts | 1, 3 |  |",
        "| local |  | 50.0 ± 0.0 |",
    ]
