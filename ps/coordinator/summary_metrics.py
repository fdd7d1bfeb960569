"""The losses and accuracies in a run's summary, each with a text that says which samples it is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from roundtable.common.policies import Policy
from roundtable.ps.coordinator.state.ledger import Ledger, Recent


@dataclass(frozen=True)
class Measured:
    """An accuracy that a script logged outside of a batch."""

    value: float
    #: The number of rounds before it was logged.
    round: int
    #: The number of held-out samples that it is over, if the script logged that too.
    held_out: int | None = None

    @property
    def of(self) -> str:
        """Return a few words on the samples and the round of the measurement."""
        what = "samples of the script's choice" if self.held_out is None else f"{self.held_out} held-out samples"
        return f"{what}, after round {self.round}"


def measured(values: Mapping[str, float | None], round_: int) -> Measured | None:
    """Return the accuracy in one call of `run.log` outside of a batch, if there is one."""
    if "accuracy" not in values:
        return None
    value, held_out = values["accuracy"], values.get("held_out")
    is_count = held_out is not None and held_out >= 1 and float(held_out).is_integer()
    return Measured(float("nan") if value is None else value, round_, int(held_out) if is_count and held_out else None)


def results(ledger: Ledger, policy: Policy, accuracy: Measured | None) -> dict[str, Any]:
    """Return the summary's entries on results.

    `rounds` counts global batches under every policy. `epochs` counts whole passes over the data. `loss` is the mean of what
    scripts logged in batches, over the newest epoch's worth of rounds. So is `accuracy` if no script measured one.
    """
    rounds, epochs = ledger.done
    loss, trained = ledger.recent("loss"), ledger.recent("accuracy")
    found: dict[str, Any] = {"rounds": rounds}
    if policy.is_local:
        found["merges"] = ledger.totals.rounds
    found |= {"epochs": epochs, "loss": None, "loss_of": None, "accuracy": None, "accuracy_of": None}
    if loss is not None:
        found |= {"loss": loss.value, "loss_of": _trained_on(loss, policy)}
    if accuracy is not None:
        found |= {"accuracy": accuracy.value, "accuracy_of": accuracy.of}
    elif trained is not None:
        found |= {"accuracy": trained.value, "accuracy_of": _trained_on(trained, policy)}
    return found


def _trained_on(found: Recent, policy: Policy) -> str:
    first, last = found.rounds[0], found.rounds[-1]
    rounds = f"rounds {first} to {last}" if last > first else f"round {first}"
    whose = ", by replicas before they were merged" if policy.is_local else ""
    return f"training samples of {rounds}{whose}"
