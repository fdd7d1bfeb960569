"""The end of a run in a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roundtable.cluster.run.run_directory import LOGS
from roundtable.common.runtime.errors import ClusterError
from roundtable.common.storage.event_log import some
from roundtable.common.storage.run_files import MODEL_FILE, SAVED_MODELS

#: Characters of a hash that are shown.
SHORT_SHA = 12


def results_line(summary: Mapping[str, Any]) -> str:
    """Return the results of a run in one line."""
    if not summary["rounds"] and "weights_sha256" in summary and summary["weights_sha256"] is None:
        return "no model was trained"
    results = []
    if summary.get("accuracy") is not None:
        results.append(f"accuracy {summary['accuracy']:.1%}{_of(summary.get('accuracy_of'))}")
    if summary.get("loss") is not None:
        results.append(f"loss {summary['loss']:.4f}{_of(summary.get('loss_of'))}")
    rounds = count(summary["rounds"], "round")
    if summary.get("merges") is not None:
        rounds += f" in {count(summary['merges'], 'merge')}"
    before = summary.get("samples_before_resume", 0)
    since = f", {summary['samples'] - before} of them since it was resumed," if before else ""
    amounts = f"{rounds}, {summary['samples']} samples{since} in {summary['seconds']:.1f} s"
    if summary.get("samples_per_second") is not None:
        amounts += f" ({summary['samples_per_second']:.0f} samples/s)"
    return ", ".join([*results, amounts])


def summary_lines(summary: Mapping[str, Any], folder: Path) -> list[str]:
    """Return a few lines on the end of a run: the results, and where they are."""
    lines = [f"done: {results_line(summary)}"]
    extra = {"micro_batches_recomputed": "redone", "dropped": "dropped"}
    told = [f"{n} micro-batch{'es' * (n > 1)} {text}" for key, text in extra.items() if (n := summary.get(key))]
    if told:
        lines.append(", ".join(told))
    if end := summary.get("ended_early"):
        lines.append(f"ended early after round {end['round']}, as {end['worker']} asked: {end['reason']}")
    if failed := summary.get("workers_failed"):
        lines.append(f"went on without {some(failed)}")
    for name, round_ in summary.get("left_early", {}).items():
        lines.append(f"{name} left after round {round_}, as its script ended; other workers did the rest of its work")
    for name, why in summary.get("failed_after_the_last_round", {}).items():
        lines.append(f"{name} failed after the last round, which changes nothing of the model: {why}")
    if summary.get("weights_sha256"):
        lines.append(f"weights_sha256 {summary['weights_sha256'][:SHORT_SHA]}")
    if (folder / MODEL_FILE).exists():
        lines.append(f"the model is in {folder / MODEL_FILE}")
    for name, saved in summary.get("saved", {}).items():
        lines.append(f"the model of round {saved['round']} is in {folder / SAVED_MODELS / name}.safetensors")
    return lines


def _of(what: str | None) -> str:
    return f" ({what})" if what else ""


def count(number: int, what: str) -> str:
    """Return '1 worker', '2 workers'."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def check_trained(summary: Mapping[str, Any], script: str | None, folder: Path) -> None:
    """Raise ClusterError if there was a model to train and no round trained it."""
    if summary.get("weights_sha256") and not summary["rounds"]:
        what = script or "the example"
        raise ClusterError(f"nothing was trained: {what} came to no batch of run.batches(); its logs are in {folder / LOGS}.")
