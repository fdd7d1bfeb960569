"""All pushes of a round must have the same settings of parameter groups."""

from __future__ import annotations

from typing import Any

import pytest

from roundtable.common.protocol.messages.setup import Update
from roundtable.common.runtime.errors import UsageError
from roundtable.ps.updates.settings_of_round import check_same

UPDATE = Update("AdamW", [{"lr": 0.1, "betas": [0.9, 0.99]}, {"lr": 0.2, "betas": [0.9, 0.99]}])


@pytest.mark.parametrize("other", [[{}, {}], [{"lr": 0.1}, {"lr": 0.2}], [{"betas": [0.9, 0.99]}, {}]])
def test_a_setting_that_was_not_sent_is_the_first_one(other: list[dict[str, Any]]) -> None:
    check_same(3, UPDATE, ("worker-0", []), ("worker-1", other))
    check_same(3, UPDATE, ("worker-0", other), ("worker-1", []))


def test_the_error_names_the_setting_the_workers_and_both_values() -> None:
    sent = [{"lr": 0.1}, {"betas": [0.8, 0.99], "lr": 0.2}]
    with pytest.raises(UsageError) as caught:
        check_same(7, UPDATE, ("worker-2", []), ("worker-0", sent))
    text = (
        "worker-2 and worker-0 have set different values for round 7: betas of parameter group 1 is [0.9, 0.99] on worker-2 and "
    )
    assert str(caught.value).startswith(f"{text}[0.8, 0.99] on worker-0. ")
