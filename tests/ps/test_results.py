"""The summary's numbers are of what they are said to be of."""

from __future__ import annotations

from typing import Any

import pytest

from roundtable.common.config.batch_plan import Segment, make_segment
from roundtable.common.config.settings import Settings
from roundtable.common.policies import load
from roundtable.common.protocol.messages.commit import Committed, Report
from roundtable.common.protocol.messages.setup import Setup, Update
from roundtable.common.protocol.model_spec import TensorSpec
from roundtable.ps.coordinator.state.ledger import Ledger
from roundtable.ps.coordinator.summary_metrics import Measured, measured, results


class Run:
    """The ledger of a run on one server; the loss of each update is its number."""

    def __init__(self, *sizes: tuple[int, int], rounds: int | None = None, **settings: Any) -> None:
        """`sizes` are samples and epochs of each segment, in rounds of 8."""
        self.policy = load(Settings(servers=1, **settings))
        self.ledger = Ledger(self.policy.settings, self.policy)
        self.ledger.set_up(Setup([TensorSpec("a", [4], "float32", 0)], Update("SGD", [{"lr": 0.1}])))
        before: Segment | None = None
        for samples, epochs in sizes:
            before = make_segment(
                before=before, samples=samples, global_batch=8, micro_batch=2, epochs=epochs, round_limit=rounds
            )
            self.ledger.plan(before)

    def commit(self, updates: int, samples: int = 8, first: int = 0) -> None:
        for number in range(first, updates):
            row = Committed(number, samples, 4, 0, {"loss": float(number), "accuracy": 0.5})
            self.ledger.report(0, Report(number, number + 1, [row]))

    def found(self, accuracy: Measured | None = None) -> dict[str, Any]:
        return results(self.ledger, self.policy, accuracy)


def test_one_epoch_of_a_hundred_is_one_and_the_loss_is_that_of_an_epochs_worth_of_rounds() -> None:
    run = Run((22 * 8, 100), rounds=23)
    run.commit(23)
    found = run.found()
    assert (found["rounds"], found["epochs"], "merges" in found) == (23, 1, False)
    assert found["loss"] == pytest.approx(sum(range(1, 23)) / 22)
    assert found["loss_of"] == found["accuracy_of"] == "training samples of rounds 1 to 22"


def test_where_all_epochs_are_whole_the_loss_is_that_of_the_last() -> None:
    run = Run((4 * 8, 2), (4 * 8, 1))
    run.commit(12)
    assert run.found() | {"accuracy": 0} == {
        "rounds": 12, "epochs": 3, "loss": 9.5, "loss_of": "training samples of rounds 8 to 11",
        "accuracy": 0, "accuracy_of": "training samples of rounds 8 to 11",
    }  # fmt: skip


def test_rounds_of_few_samples_count_less() -> None:
    run = Run((10, 2))
    for number, samples in enumerate((8, 2, 8, 2)):
        run.commit(number + 1, samples, first=number)
    assert run.found()["loss"] == pytest.approx((2 * 8 + 3 * 2) / 10)


@pytest.mark.parametrize(
    ("steps", "after", "merges", "rounds", "of"),
    [(16, 0, 9, 132, "rounds 96 to 131"), (4, 3, 36, 132, "rounds 107 to 131"), (16, 0, 3, 48, "rounds 16 to 47")],
)
def test_merges_of_local_steps_are_not_called_rounds(steps: int, after: int, merges: int, rounds: int, of: str) -> None:
    run = Run((22 * 8, 6), policy="local", local_steps=steps, local_after=after)
    run.commit(merges)
    found = run.found()
    assert (found["merges"], found["rounds"], found["epochs"]) == (merges, rounds, rounds // 22)
    assert found["loss_of"] == f"training samples of {of}, by replicas before they were merged"


def test_the_loss_of_parts_is_that_of_their_last_epoch() -> None:
    run = Run((22 * 8, 6), policy="average")
    run.commit(1)
    found = run.found()
    assert (found["merges"], found["rounds"], found["epochs"]) == (1, 132, 6)
    assert found["loss_of"] == "training samples of rounds 110 to 131, by replicas before they were merged"


def test_an_accuracy_that_was_measured_says_on_what() -> None:
    run = Run((4 * 8, 1))
    assert run.found() == {
        "rounds": 0, "epochs": 0, "loss": None, "loss_of": None, "accuracy": None, "accuracy_of": None
    }  # fmt: skip
    run.commit(4)
    assert measured({"loss": 1.0}, 4) is None
    for values, of in [
        ({"accuracy": 0.9}, "samples of the script's choice, after round 4"),
        ({"accuracy": 0.9, "held_out": 360.0}, "360 held-out samples, after round 4"),
        ({"accuracy": 0.9, "held_out": 0.2}, "samples of the script's choice, after round 4"),
        ({"accuracy": 0.9, "held_out": None}, "samples of the script's choice, after round 4"),
    ]:
        found = run.found(measured(values, 4))
        assert (found["accuracy"], found["accuracy_of"]) == (0.9, of)
