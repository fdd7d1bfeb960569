"""Sentences that say how a worker's model, optimizer or batches differ from those of the other workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from roundtable.common.config.batch_plan import Segment
from roundtable.common.protocol.messages.setup import Setup, Update
from roundtable.common.protocol.model_spec import TensorSpec
from roundtable.common.storage.event_log import some

ADVICE = "every worker must run the same script on the same data"
#: By field of a segment: its name in messages.
_FIELDS = {
    "samples": "samples",
    "global_batch": "global_batch",
    "micro_batch": "micro_batch",
    "min_micro_batch": "min_micro_batch",
    "epochs": "epochs",
    "rounds": "rounds",
}


def of_setups(known: Setup, owner: str, other: Setup, who: str) -> str:
    """Return a sentence that says how two models or their optimizers differ.

    `owner` and `who` name the processes that have `known` and `other`.
    """
    for a, b in zip(known.tensors, other.tensors, strict=False):
        if a != b:
            return (
                f"{who}'s model is not {owner}'s: it has {_tensor(b)} where {owner} has {_tensor(a)}; a run has one model "
                "from its beginning to its end."
            )
    if len(known.tensors) != len(other.tensors):
        more, longer = (other, who) if len(other.tensors) > len(known.tensors) else (known, owner)
        extra = more.tensors[min(len(known.tensors), len(other.tensors))]
        return (
            f"{who}'s model has {len(other.tensors)} parameters and buffers where {owner}'s has "
            f"{len(known.tensors)}: only {longer} has {_tensor(extra)}; {ADVICE}."
        )
    if known.sharded_layers != other.sharded_layers:
        return f"{who}'s sharded layers are not {owner}'s: {other.sharded_layers} instead of {known.sharded_layers}."
    if known.tables != other.tables:
        return f"{who}'s row-sparse tables are not {owner}'s: {other.tables} instead of {known.tables}."
    if known.file != other.file:
        names = {a.name for a in known.file} ^ {b.name for b in other.file} or {b.name for b in other.file if b not in known.file}
        return f"{who}'s state_dict is not {owner}'s: they differ in {some(sorted(names)) or 'their order'}; {ADVICE}."
    return f"{who} asks for another optimizer than {owner}: {_updates(known.update, other.update)}; {ADVICE}."


def of_plans(known: Sequence[Segment], owner: str, other: Segment, who: str) -> str:
    """Return a sentence that says how the segment `other` differs from the known one, or that it does not follow on those.

    `owner` and `who` name the processes that have `known` and `other`.
    """
    if other.index < len(known):
        a, b = (msgspec.structs.asdict(segment) for segment in (known[other.index], other))
        found = [f"{name} {b[key]} where {owner} has {a[key]}" for key, name in _FIELDS.items() if a[key] != b[key]]
        if found:
            return f"{who} asks for batches with {' and '.join(found)}; {ADVICE}."
    return f"{who} asks for batches that do not go on from those of {owner}; {ADVICE}."


def _tensor(spec: TensorSpec) -> str:
    rule = f", merged by '{spec.rule}'" if spec.group < 0 else f", parameter group {spec.group}"
    return f"'{spec.name}' ({spec.dtype} {spec.shape}{rule})"


def _updates(known: Update, other: Update) -> str:
    if known.optimizer != other.optimizer:
        return f"{other.optimizer} instead of {known.optimizer}"
    if known.classes != other.classes:
        return f"the classes {other.classes} instead of {known.classes}"
    if known.clip_norm != other.clip_norm:
        return f"clip_norm {other.clip_norm} instead of {known.clip_norm}"
    if len(known.groups) != len(other.groups):
        return f"{len(other.groups)} parameter groups instead of {len(known.groups)}"
    for number, (a, b) in enumerate(zip(known.groups, other.groups, strict=True)):
        for key in sorted(a.keys() | b.keys()):
            if a.get(key) != b.get(key):
                where = f" in parameter group {number}" if len(known.groups) > 1 else ""
                return f"{key} {_shown(b, key)} instead of {_shown(a, key)}{where}"
    return f"{other} instead of {known}"


def _shown(group: Mapping[str, Any], key: str) -> str:
    return str(group[key]) if key in group else "missing"
