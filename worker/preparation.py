"""Makes the parts that a call of `run.optimizer()` asks for, before another process hears of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from roundtable.common.config.worker_facts import Fact
from roundtable.common.model.layout import CHUNK_BYTES
from roundtable.common.policies import Policy
from roundtable.common.protocol.messages.setup import Update
from roundtable.common.runtime.errors import UsageError
from roundtable.common.runtime.skip_dynamo import no_compiler
from roundtable.worker import facts as alike
from roundtable.worker.layers.sharded_linear import Sharded, check_sharding, find_layers
from roundtable.worker.layers.sparse_embedding import SparseEmbedding, check_training, find_tables
from roundtable.worker.loop.script_edits import check_layers
from roundtable.worker.optim.inner_optimizer import InnerOptimizer
from roundtable.worker.optim.optimizer import (
    Groups,
    Hypers,
    Per,
    Schedule,
    arguments_of,
    check_shapes,
    class_of,
    example_optimizer,
    is_whole,
    make_optimizer,
    name_of,
    parameter_groups,
    plain_settings,
)
from roundtable.worker.replica.buffers import Rules
from roundtable.worker.replica.replica import Replica


@dataclass(frozen=True)
class OptimizerCall:
    """The arguments of `run.optimizer()`."""

    cls: type[torch.optim.Optimizer]
    hyper: dict[str, Any]
    schedule: Schedule | None
    schedule_per: Per
    clip_norm: float | None


@dataclass(frozen=True)
class Preparation:
    """A replica of the model, and the settings of its training."""

    replica: Replica
    tables: list[SparseEmbedding]
    layers: list[Sharded]
    #: Parameter groups, without the weights of sparse embeddings and sharded layers.
    dense: list[dict[str, Any]]
    update: Update
    #: The optimizer that steps here, or one like the servers' optimizer, for a schedule to step.
    optimizer: InnerOptimizer | torch.optim.Optimizer
    #: The script's settings that `update` does not have.
    facts: list[Fact]
    #: None if there is no schedule to compare between workers.
    schedule: alike.ScheduleFacts | None


def prepare(
    model: nn.Module, rules: Rules, params: Iterable[Any] | None, call: OptimizerCall, policy: Policy, servers: int
) -> Preparation:
    """Make the replica, and check that servers can train it. Raises UsageError with the reason if they cannot."""
    cls, hyper, clip_norm = call.cls, call.hyper, call.clip_norm
    if clip_norm is not None and clip_norm <= 0:
        raise UsageError(f"clip_norm is {clip_norm}; a norm to clip to must be above 0.")
    groups = parameter_groups(model, params)
    trained = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
    check_layers(model, {id(p) for group in trained for p in group["params"]} if policy.is_local else ())
    tables = find_tables(model, trained)
    layers = find_layers(model, trained)
    weights = {id(table.module.weight) for table in tables} | {id(p) for one in layers for p in one.layer.parameters()}
    dense = [{**group, "params": [p for p in group["params"] if id(p) not in weights]} for group in groups]
    group_of = {id(p): number for number, group in enumerate(dense) for p in group["params"]}
    specs, sharded = [table.spec for table in tables], [one.spec for one in layers]
    classes = [class_of(group, cls) for group in groups]
    whole = set() if policy.is_local else _whole(classes, dense, hyper, policy, {spec.group for spec in (*specs, *sharded)})
    at_once = policy.applies == "push"
    replica = Replica(model, group_of, servers, specs, sharded, rules, at_once, weights, whole)
    check_sharding(layers, policy, clip_norm is not None)
    optimizer: InnerOptimizer | torch.optim.Optimizer
    if policy.is_local:
        check_training(tables, cls, [dict(hyper)] * len(groups), policy)
        outer = policy.outer_optimizer
        update = Update(outer[0] if outer else None, [dict(outer[1]) if outer else {} for _ in groups])
        optimizer = InnerOptimizer(make_optimizer(cls, groups, hyper), call.schedule, call.schedule_per, clip_norm)
    else:
        with no_compiler():
            optimizer = example_optimizer(cls, groups, hyper)
        names = [name_of(one) for one in classes]
        bound = clip_norm if policy.applies == "round" else None
        update = Update(names[0], plain_settings(optimizer), bound, names if len(set(names)) > 1 else [])
        for table in tables:
            check_training([table], classes[table.spec.group], update.groups, policy)
    return Preparation(replica, tables, layers, dense, update, optimizer, *_facts(call, groups, policy.is_local))


def _whole(
    classes: Sequence[type[torch.optim.Optimizer]], groups: Groups, hyper: dict[str, Any], policy: Policy, layers: set[int]
) -> set[int]:
    """Return the ids of the parameters that are updated whole.

    `layers` are the groups of tables and sharded layers. Raises UsageError if servers cannot run a group's class.
    """
    found: set[int] = set()
    for number, (cls, group) in enumerate(zip(classes, groups, strict=True)):
        if "." in name_of(cls) and number in layers:
            raise UsageError(
                f"{cls.__name__} is not a class of torch.optim, and row-sparse tables and sharded layers need one of these: put "
                "them into a group of another class."
            )
        arguments = arguments_of(group, hyper)
        with no_compiler():
            if not is_whole(cls, arguments):
                continue
            check_shapes(cls, group, arguments)
        if number in layers:
            raise UsageError(
                f"{cls.__name__} updates whole tensors, but row-sparse tables and sharded layers are on several servers: put "
                "them into a group of another class."
            )
        largest = max((parameter.numel() * 4 for parameter in group["params"]), default=0)
        if policy.applies == "push" and largest > CHUNK_BYTES:
            raise UsageError(
                f"{cls.__name__} updates whole tensors, and the largest has {largest >> 20} MiB: policy {policy.settings.policy} "
                f"takes at most {CHUNK_BYTES >> 20}. Choose sync or backup, or another class."
            )
        found |= {id(parameter) for parameter in group["params"]}
    return found


def _facts(call: OptimizerCall, groups: list[dict[str, Any]], is_local: bool) -> tuple[list[Fact], alike.ScheduleFacts | None]:
    """Return the script's settings of the optimizer beyond an `Update`, and an object that gives facts about the schedule."""
    facts = [alike.setting("clip_norm", call.clip_norm), alike.setting("schedule_per", call.schedule_per)]
    facts.append(alike.setting("the schedule", "none" if call.schedule is None else "set"))
    with no_compiler():
        try:
            example = example_optimizer(call.cls, groups, call.hyper)
            if is_local:
                facts += alike.optimizer_facts(example)
            if call.schedule is not None:
                hypers = Hypers(example, call.schedule, call.schedule_per, lambda epoch: None)
                return facts, alike.ScheduleFacts(hypers)
        except Exception:
            if not is_local:  # a local optimizer may be of any class, also of one that needs the model's own tensors
                raise
    return facts, None
