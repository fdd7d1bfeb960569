"""The systems that are compared: one module each, found by its name.

A module has `commands(job)`, which returns the processes to start for one run, and `FLAGS`, the switches that it knows (None: it
passes on any flag). Optional names:

- `VARIANTS` maps words to flags. Without it each switch is a word.
- `not_sparse(flags)` returns why the system cannot train with sparse gradients.
- `wire(job)` returns the traffic of a run that is over.

The workers write their steps as `benchmarks.compare.training` says.
"""

from __future__ import annotations

import importlib
import pkgutil
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

import msgspec

from benchmarks.compare.workloads import Workload
from benchmarks.network import Host
from roundtable.common.runtime.errors import UsageError


@dataclass(frozen=True)
class Command:
    """A process to start: `argv` on host number `host` of the job's."""

    name: str
    host: int
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One run of one system. `steps` includes the warm-up. `folder` is empty, and no other job uses it."""

    workload: Workload
    steps: int
    slow: float
    hosts: Sequence[Host]
    folder: Path
    flags: Sequence[str] = ()

    @property
    def networked(self) -> bool:
        """Return whether there is a network between the hosts."""
        return bool(self.hosts[0].prefix)

    def worker_arguments(self) -> list[str]:
        """Return the arguments of a worker script, except its rank."""
        return ["--model", self.workload.name, "--steps", str(self.steps), "--slow", str(self.slow)]


class Wire(msgspec.Struct, frozen=True):
    """The traffic of a run, by step: MB of tensors that workers sent and received, and seconds of codecs in all processes."""

    megabytes: float
    encode_s: float
    decode_s: float


class System(Protocol):
    """The names that each module of this package has."""

    FLAGS: Sequence[str] | None

    def commands(self, job: Job) -> list[Command]: ...


@dataclass(frozen=True)
class Entry:
    """A system with flags, under the name it has in tables."""

    name: str
    system: str
    flags: tuple[str, ...]

    def commands(self, job: Job) -> list[Command]:
        return _load(self.system).commands(job)

    def refuses(self, workload: Workload) -> str:
        """Return why the system does not train this, in a sentence, or ''."""
        why = getattr(_load(self.system), "not_sparse", None)
        return str(why(self.flags)) if why is not None and workload.sparse else ""

    def wire(self, job: Job) -> Wire | None:
        """Return the traffic of a run that has ended well. None if the system does not count it."""
        count = getattr(_load(self.system), "wire", None)
        return cast(Wire, count(job)) if count is not None else None


def names() -> list[str]:
    """Return the names of all systems."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def parse_entry(text: str) -> Entry:
    """Return the entry that `[NAME=]SYSTEM[:VARIANT,...] [FLAGS]` names: 'ddp', 'ours:socket,bf16', 'one=ours --servers 1'.

    Without NAME, the whole text is the name. Raises UsageError for an unknown system, variant or flag.
    """
    name, equals, rest = text.partition("=")
    if not equals or " " in name.strip():
        name, rest = text, text
    try:
        head, *given = shlex.split(rest) or [""]
    except ValueError as error:
        raise UsageError(f"--system '{text}' cannot be read: {str(error).lower()}.") from None
    system, colon, words = head.partition(":")
    if system not in names():
        raise UsageError(f"--system '{text}': there is no system '{system}'; there are {', '.join(names())}.")
    known = _load(system).FLAGS
    variants = getattr(_load(system), "VARIANTS", {flag: (f"--{flag}",) for flag in known or ()})
    flags: list[str] = []
    for word in words.split(",") if colon else ():
        if word not in variants:
            has = f"it has {', '.join(v for v in variants if '/' not in v)}" if variants else "it has none"
            raise UsageError(f"--system '{text}': {system} has no variant '{word}'; {has}.")
        flags += variants[word]
    for flag in given:
        if known is not None and flag.removeprefix("--") not in known:
            has = f"it has {', '.join(f'--{k}' for k in known)}" if known else "it has none"
            raise UsageError(f"--system '{text}': {system} has no flag {flag}; {has}.")
    return Entry(" ".join(name.split()), system, (*flags, *given))


def module_command(module: str, *args: str) -> list[str]:
    """Return the command line that runs a module of this project as a script."""
    return [sys.executable, "-m", module, *args]


def _load(system: str) -> System:
    return cast(System, importlib.import_module(f"{__name__}.{system}"))
