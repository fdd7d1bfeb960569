"""A worker's codec state: what is not counted is sent later, once."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from roundtable.common.codecs.feedback import Feedback

NUMEL = 5


class Mass(RuleBasedStateMachine):
    """A sender that sends some of what it has; whatever becomes of its frames, nothing is lost and nothing sent twice."""

    def __init__(self) -> None:
        super().__init__()
        self.feedback = Feedback()
        self.given = 0
        self.counted = 0
        self.under_way: dict[int, tuple[int, int]] = {}
        self.frames = 0

    @rule(gradient=st.integers(-9, 9), sent=st.integers(-9, 9))
    def send(self, gradient: int, sent: int) -> None:
        state = self.feedback.state(0)
        total = (0 if state is None else state["residual"]) + torch.full((NUMEL,), float(gradient))
        self.feedback.sent(0, self.frames, {"residual": total - sent})
        self.under_way[self.frames] = gradient, sent
        self.frames += 1

    @rule(gradient=st.integers(-9, 9))
    def send_without_a_state(self, gradient: int) -> None:
        self.feedback.sent(0, "raw", None)
        self.given, self.counted = self.given + gradient, self.counted + gradient
        assert not self.feedback.commit(0, "raw")

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def count(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.under_way)))
        gradient, sent = self.under_way.pop(key)
        assert self.feedback.commit(0, key) and not self.feedback.commit(0, key)
        self.given, self.counted = self.given + gradient, self.counted + sent

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.under_way)))
        del self.under_way[key]
        self.feedback.drop(0, key)
        self.feedback.drop(0, key)

    @invariant()
    def what_was_given_is_counted_or_kept(self) -> None:
        states = [self.feedback.state(0), *(before for before, _ in self.feedback._pending.values())]
        kept = sum((state["residual"] for state in states if state is not None), torch.zeros(NUMEL))
        assert torch.equal(kept, torch.full((NUMEL,), float(self.given - self.counted)))


TestMass = Mass.TestCase


# I13
def test_a_second_frame_of_a_chunk_does_not_send_again_what_the_first_has_with_it() -> None:
    feedback, before = Feedback(), {"residual": torch.ones(NUMEL)}
    feedback.sent(0, "zeroth", before)
    feedback.commit(0, "zeroth")
    feedback.sent(0, "first", {"residual": torch.zeros(NUMEL)})
    assert feedback.state(0) is None
    feedback.drop(0, "first")
    assert feedback.state(0) == before
