"""A worker's codec state: what is not counted is sent later, once; and kept by parameter over any layout."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.codecs.chunks import coded_runs
from common.codecs.feedback import Feedback
from common.errors import UsageError
from common.layout import Layout, TensorSpec, make_layout

shapes = st.sampled_from([[40, 30], [32, 32], [5], [3, 4], [70, 2, 20]])
models = st.lists(shapes, min_size=1, max_size=8)
chunk_sizes = st.sampled_from([1000, 4096, 10_000, 64 << 10])


def layout_of(shapes: list[list[int]], servers: int = 1, chunk_bytes: int = 4 << 20) -> Layout:
    with mock.patch("common.layout.CHUNK_BYTES", chunk_bytes):
        return make_layout([TensorSpec(f"layer.{n}/w", shape, "float32", 0) for n, shape in enumerate(shapes)], servers)


def coded_numel(layout: Layout, chunk: int) -> int:
    return sum(length for _, length in coded_runs(layout, layout.chunks[chunk]))


def filled(layout: Layout, leave_out: frozenset[int] = frozenset()) -> Feedback:
    """Every element of every state has a value of its own, but those of the chunks left out."""
    feedback, at = Feedback(layout), 1.0
    for chunk in layout.chunks:
        numel = coded_numel(layout, chunk.id)
        if numel and chunk.id not in leave_out:
            values = torch.arange(at, at + numel)
            feedback.sent(chunk.id, "try", {"residual": values, "velocity": -values})
            assert feedback.commit(chunk.id, "try")
        at += numel
    return feedback


class Mass(RuleBasedStateMachine):
    """A sender that sends some of what it has; whatever becomes of its frames, nothing is lost and nothing sent twice."""

    def __init__(self) -> None:
        super().__init__()
        self.feedback = Feedback(layout_of([[40, 30]]))
        self.given = 0
        self.counted = 0
        self.under_way: dict[int, tuple[int, int]] = {}
        self.frames = 0

    @rule(gradient=st.integers(-9, 9), sent=st.integers(-9, 9))
    def send(self, gradient: int, sent: int) -> None:
        state = self.feedback.state(0)
        total = (0 if state is None else state["residual"]) + torch.full((1200,), float(gradient))
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
        kept = self.feedback.state_dict().get("residual/layer.0/w", torch.zeros(1200))
        assert torch.equal(kept, torch.full((1200,), float(self.given - self.counted)))


TestMass = Mass.TestCase


def test_a_second_frame_of_a_chunk_does_not_send_again_what_the_first_has_with_it() -> None:
    feedback = filled(layout_of([[32, 32]]))
    before = feedback.state(0)
    feedback.sent(0, "first", {"residual": torch.zeros(1024)})
    assert feedback.state(0) is None
    feedback.drop(0, "first")
    assert feedback.state(0) == before


@given(models, st.integers(1, 3), st.integers(1, 3), chunk_sizes, chunk_sizes, st.frozensets(st.integers(0, 3)))
def test_state_survives_another_layout(
    shapes: list[list[int]], m: int, n: int, first: int, second: int, leave_out: frozenset[int]
) -> None:
    saved = filled(layout_of(shapes, m, first), leave_out).state_dict()
    other = Feedback(layout_of(shapes, n, second))
    other.load_state_dict(saved)
    again = other.state_dict()
    assert all(torch.equal(again[key], values) for key, values in saved.items())
    assert not any(values.any() for key, values in again.items() if key not in saved)  # a packed neighbour may have zeros
    back = Feedback(layout_of(shapes, m, first))
    back.load_state_dict(again)
    original = filled(layout_of(shapes, m, first), leave_out)
    for chunk in layout_of(shapes, m, first).chunks:
        before, after = original.state(chunk.id), back.state(chunk.id)
        if before is None:
            assert after is None or not any(values.any() for values in after.values())
        else:
            assert after is not None and all(torch.equal(after[name], values) for name, values in before.items())


def test_names_are_the_parameters_and_small_ones_have_no_state() -> None:
    layout = layout_of([[40, 30], [40], [32, 32]])
    saved = filled(layout).state_dict()
    shapes = {
        f"{state}/{name}": n for state in ("residual", "velocity") for name, n in [("layer.0/w", (1200,)), ("layer.2/w", (1024,))]
    }
    assert {key: tuple(values.shape) for key, values in saved.items()} == shapes
    assert saved["residual/layer.2/w"][0] == 1201


def test_what_is_loaded_for_a_chunk_of_one_parameter_is_not_copied() -> None:
    layout = layout_of([[40, 30]], chunk_bytes=2400)
    saved = {"residual/layer.0/w": torch.arange(1200.0)}
    feedback = Feedback(layout)
    feedback.load_state_dict(saved)
    second = feedback.state(1)
    assert second is not None and second["residual"].data_ptr() == saved["residual/layer.0/w"][600:].data_ptr()


def test_loading_forgets_what_was_there() -> None:
    layout = layout_of([[32, 32]])
    feedback = filled(layout)
    feedback.sent(0, "later", {"residual": torch.ones(1024)})
    feedback.load_state_dict({})
    assert feedback.state(0) is None and not feedback.commit(0, "later") and feedback.state_dict() == {}


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("residual/layer.0/w", torch.zeros(1000)),
        ("residual/layer.0/w", torch.zeros(1024, dtype=torch.float64)),
        ("residual/layer.1/w", torch.zeros(5)),  # too small to be compressed
        ("residual/other", torch.zeros(1024)),
        ("residual", torch.zeros(1024)),
    ],
)
def test_state_of_another_model_is_refused_by_name(key: str, values: torch.Tensor) -> None:
    with pytest.raises(UsageError, match=f"'{key}'"):
        Feedback(layout_of([[32, 32], [5]])).load_state_dict({key: values})
