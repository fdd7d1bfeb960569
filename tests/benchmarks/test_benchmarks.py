"""The benchmarks run, what they write is there, and their arithmetic is right. Nothing here depends on how long things take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import msgspec
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are not installed
from benchmarks import __main__ as command_line
from benchmarks import merging
from benchmarks.compare import report
from benchmarks.compare.measure import Measurement, step_durations
from benchmarks.compare.report import Result, Results
from benchmarks.compare.systems import Wire, names, parse_entry
from benchmarks.compare.workloads import WORKLOADS
from roundtable.common.config.settings import PolicyName, PushCodec, WeightCodec
from roundtable.common.runtime.errors import UsageError

ROOT = Path(__file__).parents[2]


def measurement(ms: float, loss: float = 2.0, other: float | None = None) -> Measurement:
    losses = [loss, loss if other is None else other]
    return Measurement([ms / 1000] * 3, 0.5, 100.0, losses, 3.0, 0.0)


def results(*runs: tuple[str, int, Measurement | None]) -> Results:
    return Results(
        {},
        [
            Result("loopback", "cnn", system, repeat, measured, "" if measured else "it broke.")
            for system, repeat, measured in runs
        ],
    )


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


@pytest.mark.slow
@pytest.mark.long
def test_a_quick_run_writes_table_plot_and_json_and_we_train_to_ddps_loss(tmp_path: Path) -> None:
    systems = [part for name in ("independent", "ddp", "ours", "ours:socket,bf16") for part in ("--system", name)]
    command = [sys.executable, "-m", "benchmarks", "--quick", "--model", "cnn", *systems, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=220)
    logs = "".join(f"\n--- {log}\n{log.read_text()[-1500:]}" for log in tmp_path.glob("jobs/*/logs/*"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    measured = {run["system"]: run["measured"] for run in json.loads((tmp_path / "results.json").read_text())["runs"]}
    assert set(measured) == {"independent", "ddp", "ours", "ours:socket,bf16"}
    assert all(len(m["step_s"]) == 3 and m["memory_mb"] > 0 for m in measured.values())
    megabytes = sum(p.numel() for p in WORKLOADS["cnn"].model().parameters()) * 2 / 1e6
    wire = measured["ours:socket,bf16"]["wire"]
    # in each step each worker sends a gradient and gets weights; what was sent again does not count here
    assert wire["megabytes"] >= 0.95 * 4 * megabytes and wire["encode_s"] > 0 and wire["decode_s"] > 0
    assert measured["ddp"]["wire"] is None
    read, setting = report.read_results(tmp_path), ("loopback", "cnn")
    assert report.same_loss(read.of(setting, "ours"), read.of(setting, "ddp")) is True
    assert report.same_loss(read.of(setting, "independent"), read.of(setting, "ddp")) is False
    assert (tmp_path / "results.md").read_text().count("| loopback | cnn") == 4
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
    assert cells(lines[3])[2:5] == ["ours", "12.5 (5.0..20.0)", "0.75 (0.50..1.00)"]
    assert "**no**" in lines[3] and "yes" in lines[2]
    assert "failed" in lines[4] and "- loopback cnn rpc, repeat 2, failed: it broke." in lines
    report.write_results(ran, tmp_path)
    assert report.to_markdown(report.read_results(tmp_path)) == report.to_markdown(ran)
    assert len([path for path in report.write_report(ran, tmp_path) if path.stat().st_size]) == 2


def test_networks_are_compared_each_for_itself_with_ratios_to_ddp_and_rpc_and_what_travelled() -> None:
    ours = msgspec.structs.replace(measurement(30), cpu_s=1.0, memory_mb=50.0, wire=Wire(12.5, 0.004, 0.0021))
    runs = [("loopback", "ddp", measurement(10)), ("loopback", "ours", ours), ("1gbit", "ddp", measurement(60)),
            ("1gbit", "rpc", measurement(120)), ("1gbit", "ours", ours)]  # fmt: skip
    lines = report.to_markdown(Results({}, [Result(on, "cnn", system, 0, m) for on, system, m in runs])).splitlines()
    header = cells(lines[0])
    rows = {tuple(cells(line)[:3]): dict(zip(header, cells(line), strict=True)) for line in lines[2:7]}
    here, there = rows["loopback", "cnn", "ours"], rows["1gbit", "cnn", "ours"]
    assert (here["x ddp"], here["x rpc"], there["x ddp"], there["x rpc"]) == ("3.00", "", "0.50", "0.25")
    assert (there["CPU x ddp"], there["memory x ddp"]) == ("2.00", "0.50")
    assert (there["wire MB/step"], there["codec ms/step"]) == ("12.50", "4.0 + 2.1")
    assert rows["1gbit", "cnn", "rpc"]["wire MB/step"] == ""


def test_a_system_that_refuses_a_model_is_a_row_with_the_reason_and_no_failure(tmp_path: Path) -> None:
    refused = Result("loopback", "widedeep", "zero", 0, None, "it sends | all of it.", refused=True)
    ran = Results({}, [Result("loopback", "widedeep", "ddp", 0, measurement(10)), refused])
    lines = report.to_markdown(ran).splitlines()
    assert lines[3] == "| loopback | widedeep | zero   | refused: it sends \\| all of it. |"
    assert len(lines[0]) == len(lines[2]) < 200 and not any("failed" in line for line in lines)
    assert report.write_report(ran, tmp_path)


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
    assert parse_entry("ours:socket,ssp,bf16 --servers 1").flags == (
        "--transport", "tcp", "--policy", "ssp", "--compress-gradients", "bf16", "--compress-weights", "bf16", "--servers", "1",
    )  # fmt: skip
    assert parse_entry("ours:topk").flags == ("--compress-gradients", "topk", "--compress-weights", "none")
    assert parse_entry("ours:int8/onebit").flags == ("--compress-gradients", "int8", "--compress-weights", "onebit")
    entry = parse_entry("both=ddp:view,fp16")
    assert (entry.name, entry.flags) == ("both", ("--view", "--fp16"))
    for wrong in (
        "",
        "x=",
        "horovod",
        "ddp --veiw",
        "ours 'x",
        "ours:",
        "ours:sokcet",
        "ours:onebit/topk",
        "rpc:view",
        "ddp:socket",
    ):
        with pytest.raises(UsageError, match=r"^[^\n]+\.$"):
            parse_entry(wrong)


def test_systems_that_send_whole_tables_are_left_out_where_gradients_are_sparse() -> None:
    left_out = [text for text in ("zero", "rpc", "fp16=ddp --fp16") if parse_entry(text).refuses(WORKLOADS["widedeep"])]
    assert left_out == ["zero", "rpc", "fp16=ddp --fp16"]
    assert not any(parse_entry(text).refuses(WORKLOADS["widedeep"]) for text in ("ddp", "ours", "independent"))
    assert not any(parse_entry(text).refuses(WORKLOADS["cnn"]) for text in names())
    apart = [
        text for text in command_line._all("loopback") if text[:5] == "ours:" and parse_entry(text).refuses(WORKLOADS["widedeep"])
    ]
    assert apart == ["ours:local", "ours:average"]


def test_all_systems_of_the_command_line_are_there_and_all_our_codecs_and_policies_among_them() -> None:
    for on in command_line.NETWORKS:
        entries = command_line._entries(command_line._all(on))
        assert set(command_line.SYSTEMS) <= {entry.name for entry in entries} and {entry.system for entry in entries} == set(
            names()
        )
        flags = {flag for entry in entries for flag in entry.flags}
        # sync and no codec are the default
        assert {*get_args(PolicyName), *get_args(PushCodec), *get_args(WeightCodec)} - flags <= {"sync", "none"}
        coded = [entry for entry in entries if "--compress-gradients" in entry.flags]
        assert all(("tcp" in entry.flags) == (on == "loopback") for entry in coded)
    with pytest.raises(UsageError, match="given twice"):
        command_line._entries(["ddp", "ddp"])


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("mlp", 19e6, 21e6),
        ("alexnet", 61e6, 61.2e6),
        ("cnn", 0.5e6, 0.7e6),
        ("gpt", 13e6, 14e6),
        ("resnet", 11e6, 12e6),
        ("many", 5e5, 6e5),
        ("widedeep", 34e6, 35e6),
    ],
)
def test_models_have_their_sizes_and_data_are_always_the_same(name: str, least: float, most: float) -> None:
    workload = WORKLOADS[name]
    a, b = workload.model(), workload.model()
    assert least <= sum(p.numel() for p in a.parameters()) <= most
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    x, y = workload.dataset(2).tensors
    assert torch.equal(x, workload.dataset(2).tensors[0])
    assert workload.loss(a, x[:2], y[:2]).isfinite()


@pytest.mark.slow
@pytest.mark.long
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
