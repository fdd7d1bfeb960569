"""The arithmetic of sharded layers, in float64, against autograd over all logits at once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from roundtable.common.model.sparse_rows import local_of, owner_of, rows_on
from roundtable.ps.sharded.softmax import Best, OnlineSoftmax, Samples, Terms, gradient, normalised, renewed, through_normalised
from roundtable.worker.client.sharded_client import Sums
from roundtable.worker.layers.margin_losses import ArcFace, CosFace, Margin
from roundtable.worker.layers.sharded_loss import combine

pytestmark = pytest.mark.usefixtures("one_thread")


def sharded(
    weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor, servers: int, tile: int, smoothing: float, margin: Margin | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses (B), and the gradients of their mean by features and by weight, the way servers and worker get them."""
    owners = owner_of(torch.arange(len(weight)), servers)
    parts = [weight[owners == server] for server in range(servers)]
    samples = [Samples(x, torch.where(owner_of(y, servers) == m, local_of(y, servers), -1)) for m in range(servers)]
    sums = []
    for part, mine in zip(parts, samples, strict=True):
        rows = normalised(part) if margin is not None else part
        softmax = OnlineSoftmax(mine, x.shape[1])
        for start in range(0, len(part), tile):
            softmax.add(rows[start : start + tile], start)
        own = rows[mine.own[mine.own >= 0]]
        sums.append(Sums(softmax.largest, softmax.total, softmax.rows, rows.sum(0), own))
    found = combine(sums, x, y, servers, len(weight), smoothing, margin)
    slope = torch.empty_like(weight)
    for server, (part, mine) in enumerate(zip(parts, samples, strict=True)):
        g = torch.full((len(x),), 1 / len(x), dtype=x.dtype)
        terms = Terms(mine, found.log_total, g, g * found.own_slope, torch.full_like(g, smoothing / len(weight)))
        halves = [  # as two micro-batches
            Terms(Samples(x[at], mine.own[at]), terms.log_total[at], terms.g[at], terms.own_gradient[at], terms.smoothing[at])
            for at in (slice(len(x) // 2), slice(len(x) // 2, None))
        ]
        out = torch.empty_like(part)
        for start in range(0, len(part), tile):
            rows = part[start : start + tile]
            step = gradient(Terms.joined(halves), normalised(rows) if margin is not None else rows, start)
            out[start : start + tile] = through_normalised(step, rows) if margin is not None else step
        slope[owners == server] = out
    return found.losses, found.slope / len(x), slope


def plain(
    weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor, smoothing: float, margin: Margin | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same by autograd; x are features already normalised and scaled where there is a margin."""
    weight, x = weight.clone().requires_grad_(), x.clone().requires_grad_()
    logits = x @ (normalize(weight) if margin is not None else weight).T
    if isinstance(margin, CosFace):
        logits = logits - margin.scale * margin.margin * nn.functional.one_hot(y, len(weight)).to(x.dtype)
    elif isinstance(margin, ArcFace):
        angle = torch.acos(logits / margin.scale)
        own = nn.functional.one_hot(y, len(weight)).bool()
        logits = torch.where(own, torch.cos(angle + margin.margin), logits / margin.scale) * margin.scale
    losses = cross_entropy(logits, y, reduction="none", label_smoothing=smoothing)
    losses.mean().backward()
    assert x.grad is not None and weight.grad is not None
    return losses.detach(), x.grad, weight.grad


def check(servers: int, tile: int, classes: int, batch: int, one_class: bool, smoothing: float, margin: Margin | None) -> None:
    generator = torch.Generator().manual_seed(classes * 100 + batch)
    weight = torch.randn(classes, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(batch, 5, generator=generator, dtype=torch.float64) * 3
    x = normalize(x) * margin.scale if margin is not None else x
    y = torch.randint(1 if one_class else classes, (batch,), generator=generator)
    if isinstance(margin, ArcFace):  # its straight part is not cos(angle + margin)
        x = x * (normalize(weight)[y] * x).sum(1, keepdim=True).sign()
    found, expected = sharded(weight, x, y, servers, tile, smoothing, margin), plain(weight, x, y, smoothing, margin)
    for name, a, b, atol in zip(("losses", "features", "weights"), found, expected, (1e-10, 1e-8, 1e-8), strict=True):
        torch.testing.assert_close(a, b, rtol=atol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([1, 2, 3, 5]), st.sampled_from([1, 7, 1000]), st.integers(2, 150), st.integers(2, 9), st.booleans(),
    st.sampled_from([0.0, 0.1]),
)  # fmt: skip
def test_losses_and_gradients_are_those_of_all_logits_at_once(
    servers: int, tile: int, classes: int, batch: int, one_class: bool, smoothing: float
) -> None:
    assert sum(rows_on(server, servers, classes) for server in range(servers)) == classes
    check(servers, tile, classes, batch, one_class, smoothing, None)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("one_class", [False, True])
@pytest.mark.parametrize("tile", [1, 7, 701])
@pytest.mark.parametrize("servers", [1, 2, 3, 5])
def test_they_are_so_however_classes_are_divided(servers: int, tile: int, one_class: bool, smoothing: float) -> None:
    check(servers, tile, 701, 9, one_class, smoothing, None)


@pytest.mark.parametrize("margin", [CosFace(16.0, 0.35), ArcFace(16.0, 0.5)])
@pytest.mark.parametrize("servers", [1, 3])
def test_margins_are_those_of_the_papers(margin: Margin, servers: int) -> None:
    check(servers, 64, 300, 8, False, 0.0, margin)


def test_arcface_goes_on_downwards_past_a_half_turn() -> None:
    cosine = torch.linspace(-0.999, 0.999, 400, dtype=torch.float64, requires_grad=True)
    value, slope = ArcFace(1.0, 0.5).own(cosine)
    assert bool((slope > 0).all())
    (found,) = torch.autograd.grad(value.sum(), cosine)
    torch.testing.assert_close(found, slope.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arcface_is_exact_near_an_angle_of_0_and_its_slope_finite(dtype: torch.dtype) -> None:
    angle = torch.tensor([0.0, 1e-4, 5e-4, 1e-3, 1e-2], dtype=torch.float64)
    cosine = torch.cos(angle).to(dtype)
    value, slope = ArcFace(64.0, 0.5).own(cosine)
    exact = torch.cos(torch.acos(cosine.double()) + 0.5)
    torch.testing.assert_close(value.double(), exact, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-7)
    beyond, steepest = ArcFace(64.0, 0.5).own(torch.tensor([1.0, 1.0 + 1e-6], dtype=dtype))  # as a sum of products can be
    assert bool(value.isfinite().all() and beyond.isfinite().all()) and 400 < float(steepest.max()) < 500
    if dtype == torch.float64:
        torch.testing.assert_close(slope[4:], math.cos(0.5) + math.sin(0.5) / torch.tan(angle[4:]))


def test_a_sum_of_which_a_part_is_another_now_is_made_anew() -> None:
    z = torch.randn(7, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 20
    now = z.clone()
    now[:, :10] += torch.randn(7, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 5
    before, part = z[:, :10].logsumexp(1), now[:, :10].logsumexp(1)
    found = renewed(z.logsumexp(1), before, part)
    torch.testing.assert_close(found, now.logsumexp(1))
    # whatever float32 makes of nothing but this part, no p is above 1
    rough = renewed(before.float(), before.float() + 1e-6, part.float())
    assert bool((now[:, :10].float() <= rough[:, None] + 1e-6).all())
    nothing = torch.full((7,), -torch.inf)  # a server without classes
    torch.testing.assert_close(renewed(before, nothing, nothing), before)


def test_huge_logits_overflow_nowhere() -> None:
    weight, x = torch.tensor([[300.0], [-300.0], [299.0]]), torch.tensor([[1.0], [-1.0]])
    losses, by_features, by_weight = sharded(weight, x, torch.tensor([2, 0]), 2, 1, 0.0, None)
    torch.testing.assert_close(losses, cross_entropy(x @ weight.T, torch.tensor([2, 0]), reduction="none"))
    assert bool(by_features.isfinite().all()) and bool(by_weight.isfinite().all())


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 50), st.sampled_from([1, 7, 64]), st.integers(1, 10))
def test_the_best_classes_are_those_of_all_logits_at_once(classes: int, tile: int, k: int) -> None:
    weight = torch.randn(classes, 3, generator=torch.Generator().manual_seed(classes))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    best = Best(x, k)
    for start in range(0, classes, tile):
        best.add(weight[start : start + tile], start)
    values, places = (x @ weight.T).topk(min(k, classes), 1)
    torch.testing.assert_close(best.values, values)
    assert torch.equal(best.places, places)


def test_classes_that_are_not_negative_ones_move_for_their_own_samples_only() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 3, generator=generator), torch.randn(2, 3, generator=generator)
    terms = Terms(Samples(x, torch.tensor([1, 4])), torch.zeros(2), torch.ones(2), torch.tensor([-0.5, -0.25]), torch.zeros(2))
    slope = gradient(terms, weight, 0, negative=torch.tensor([True, False, True, True, False, True]))
    torch.testing.assert_close(slope[1], -0.5 * x[0])
    torch.testing.assert_close(slope[4], -0.25 * x[1])
    torch.testing.assert_close(slope[0], torch.exp(x @ weight[0]) @ x)
