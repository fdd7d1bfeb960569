"""The only definition of a run's settings.

Flags, TOML keys and the coordinator's `Welcome` are all made from `Settings`. Flags and files are flat: they name the settings of
the built-in example (`example_settings.py`) like any other.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from roundtable.common.config.example_settings import ExampleSettings
from roundtable.common.config.kinds import NonNegative, Positive, PositiveFloat, check_finite, doc
from roundtable.common.config.old_names import with_new_names
from roundtable.common.runtime.errors import UsageError

#: The name, in errors, of the place of settings that flags gave.
COMMAND_LINE = "the command line"
#: Seconds for all processes of a run to start and find each other, by default.
START_S = 600.0

PolicyName = Literal["sync", "backup", "ssp", "async", "local", "average"]
MergeName = Literal["uniform", "samples", "greedy"]
PushCodec = Literal["none", "bf16", "fp16", "int8", "onebit", "topk"]
WeightCodec = Literal["none", "bf16", "fp16", "int8", "onebit"]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about a run that its processes must agree on. Field descriptions are the flags' help texts."""

    workers: Annotated[Positive, doc("Worker processes, each with a replica of the model.")] = 2
    servers: Annotated[Positive, doc("Parameter servers, among which the parameters are divided.")] = 2
    policy: Annotated[
        PolicyName,
        doc(
            "sync: all workers, every round, reproducible; backup: skip the slowest micro-batches; ssp: bounded staleness; "
            "async: no waiting; local: local SGD; average: train apart, average at the end."
        ),
    ] = "sync"
    global_batch: Annotated[Positive, doc("Samples per round, over all workers.")] = 64
    micro_batch: Annotated[Positive, doc("Samples per micro-batch, the unit of work handed to a worker.")] = 16
    epochs: Annotated[Positive, doc("Passes over the training data.")] = 10
    rounds: Annotated[Positive | None, doc("Stop after this many rounds, even in the middle of an epoch.")] = None
    seed: Annotated[NonNegative, doc("Seed of weights, data order, augmentation and dropout.")] = 0
    threads: Annotated[Positive, doc("Torch threads per worker. Changing it may change results in the last bits.")] = 1

    transport: Annotated[
        Literal["auto", "tcp"],
        doc("auto uses shared memory on one host and TCP otherwise; tcp always uses TCP."),
    ] = "auto"
    compress_gradients: Annotated[
        PushCodec, doc("Compress gradients sent over TCP. No effect over shared memory: see --transport.")
    ] = "none"
    compress_weights: Annotated[
        WeightCodec, doc("Compress weights sent to workers, shared memory included. int8 and onebit send differences.")
    ] = "none"
    topk_ratio: Annotated[float, Meta(gt=0, le=1), doc("topk: share of the elements that is sent.")] = 0.01

    checkpoint_every: Annotated[
        float,
        Meta(ge=0),
        doc("Seconds between checkpoints; 0 disables them, including the final one."),
    ] = 60.0
    keep_checkpoints: Annotated[int, Meta(ge=2), doc("Number of newest checkpoints to keep.")] = 2
    replicas: Annotated[
        int,
        Meta(ge=0, le=1),
        doc(
            "Backup copies of each server (sync, backup only). With 1, losing a server costs no rounds but doubles server memory."
        ),
    ] = 0

    kv_memory: Annotated[Positive, doc("Key-value store: MiB of memory that each server has for it at most, keys included.")] = (
        1024
    )

    max_staleness: Annotated[NonNegative, doc("ssp: rounds by which a worker may lead the slowest.")] = 2
    backup_micro_batches: Annotated[NonNegative, doc("backup: micro-batches per round that may be skipped.")] = 1
    local_steps: Annotated[Positive, doc("local: steps each worker takes between two merges.")] = 8
    local_after: Annotated[NonNegative, doc("local: start local SGD after this many synchronous rounds; 0 = at once.")] = 0
    outer_lr: Annotated[PositiveFloat, doc("local: learning rate of the outer optimizer.")] = 0.7
    outer_momentum: Annotated[float, Meta(ge=0, lt=1), doc("local: Nesterov momentum of the outer optimizer.")] = 0.3
    average_weights_by: Annotated[
        MergeName,
        doc("average: weighting of the workers: by samples, uniform, or greedy, which keeps those that help on held-out data."),
    ] = "samples"
    staleness_lr: Annotated[bool, doc("ssp, async: divide the rate by the staleness of the push; the mean rate stays.")] = False
    delay_compensation: Annotated[
        float, Meta(ge=0), doc("ssp, async: weight of the delay-compensation term (DC-ASGD); 0 is off.")
    ] = 0.0

    #: The settings of the built-in script. No other script reads them.
    example: ExampleSettings = ExampleSettings()

    on_nonfinite: Annotated[
        Literal["fail", "skip", "allow"],
        doc("On a NaN or infinite gradient: fail = stop the run, skip = drop that update, allow = apply it."),
    ] = "fail"
    stack_dump_after: Annotated[
        float,
        Meta(ge=0),
        doc("Dump stack traces to the log after this many seconds without progress; 0 disables."),
    ] = 60.0
    heartbeat_timeout: Annotated[
        PositiveFloat | None,
        doc("Declare a process dead after so many seconds without a heartbeat. By default 3 for local workers, 15 otherwise."),
    ] = None
    progress_timeout: Annotated[
        float,
        Meta(gt=0),
        doc("Abort the run after this many seconds without progress."),
    ] = 300.0

    worker_failures: Annotated[
        NonNegative,
        doc(
            "Workers that may fail in mid-training without failing the run; other workers redo their work. A worker that fails "
            "before its first committed round does not count."
        ),
    ] = 0

    start_timeout: Annotated[
        float,
        Meta(gt=0),
        doc("Seconds for all servers and workers to connect, and then for the first worker to reach its first batch."),
    ] = START_S

    stop_timeout: Annotated[
        float,
        Meta(gt=0),
        doc(
            "Seconds in which a run that is told to stop (Ctrl-C or SIGTERM) ends the round and makes a checkpoint. A second "
            "signal stops it at once."
        ),
    ] = 25.0

    coordinator_timeout: Annotated[
        float,
        Meta(gt=0),
        doc("Seconds that servers and workers wait for a lost coordinator to come back."),
    ] = 60.0

    def __post_init__(self) -> None:
        check_finite(self)
        if self.micro_batch > self.global_batch:
            raise UsageError(
                f"micro_batch ({self.micro_batch}) must not exceed global_batch ({self.global_batch}): a micro-batch is a "
                "part of the global batch."
            )
        micro_batches = -(-self.global_batch // self.micro_batch)
        if self.policy == "backup" and self.backup_micro_batches >= micro_batches:
            raise UsageError(
                f"backup_micro_batches is {self.backup_micro_batches} but a round has only {micro_batches} micro-batches: leave "
                "at least one to apply."
            )
        if self.replicas and self.policy not in ("sync", "backup"):
            raise UsageError(f"replicas is {self.replicas} but policy is {self.policy}: only sync and backup keep copies.")
        if self.worker_failures and self.policy in ("local", "average"):
            raise UsageError(f"worker_failures is {self.worker_failures} but policy is {self.policy}, which needs all workers.")
        if self.replicas and self.servers < 2:
            raise UsageError(
                f"replicas is {self.replicas} but there is one server: a copy needs another one, so set servers to 2."
            )
        self._check_codecs()

    def _check_codecs(self) -> None:
        push, weights = self.compress_gradients, self.compress_weights
        if self.policy == "average" and push != "none":
            raise UsageError(
                f"compress_gradients is {push} but policy average sends whole weights: set compress_gradients to none."
            )
        if self.policy in ("local", "average") and weights != "none":
            raise UsageError(f"compress_weights is {weights} but policy {self.policy} takes none: set compress_weights to none.")
        if self.policy in ("ssp", "async") and weights in ("int8", "onebit"):
            raise UsageError(
                f"compress_weights is {weights}, which sends changes from one round to the next, but policy {self.policy} has no "
                "rounds that all workers share: choose bf16 or fp16, or policy sync or backup."
            )


#: The fields of the built-in example's settings, and of all settings. Files and flags treat both alike.
EXAMPLE_FIELDS = {field.name: field for field in msgspec.structs.fields(ExampleSettings)}
FIELDS = {field.name: field for field in msgspec.structs.fields(Settings) if field.name != "example"} | EXAMPLE_FIELDS


def unknown_key(key: str, known: list[str], where: str) -> UsageError:
    """Return the error for an unknown key, with the nearest known one."""
    near = difflib.get_close_matches(key, known, n=1)
    return UsageError(f"{where}: there is no setting '{key}'" + (f"; did you mean '{near[0]}'?" if near else "."))


def make_settings(values: dict[str, Any], where: str) -> Settings:
    """Check `values` and return Settings made from them. Errors name `where` (a file, 'the command line').

    Raises UsageError with one sentence for an unknown key, a wrong type, a value out of range or an impossible combination.
    """
    values = check_values(values, where)
    example = {key: values.pop(key) for key in EXAMPLE_FIELDS if key in values}
    return msgspec.convert({**values, "example": example}, Settings)


def flat(settings: Settings) -> dict[str, Any]:
    """Return the values of all settings by name, as `make_settings` takes them."""
    values = msgspec.structs.asdict(settings)
    del values["example"]
    return values | msgspec.structs.asdict(settings.example)


def check_values(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return `values` with underscores in their keys, each checked by itself, as part of the input of `make_settings`."""
    values = with_new_names(values, where)
    for key in values:
        if key not in FIELDS:
            raise unknown_key(key, sorted(FIELDS), where)
    for key, value in values.items():
        if isinstance(value, str):
            values[key] = value = next((word for word in choices(key) if word.lower() == value.lower()), value)
        try:
            msgspec.convert(value, FIELDS[key].type)
        except msgspec.ValidationError as error:
            why, hint = _one_of(key, value) if choices(key) else (in_words(error), "")
            raise refused(key, value, where, why, hint) from None
    return values


def refused(key: str, value: Any, where: str, why: str, hint: str = "") -> UsageError:
    """Return the error for a value that a setting cannot have. A flag is named as it is typed.

    `why` begins with 'must be'. `hint` is a question.
    """
    end = f"; {hint}" if hint else "."
    if where == COMMAND_LINE:
        return UsageError(f"--{key.replace('_', '-')} {why} (got {value}){end}")
    return UsageError(f"{where}: {key} {why} (got {value!r}){end}")


def in_words(error: msgspec.ValidationError) -> str:
    """Return 'must be' and what was expected."""
    found = re.match(r"Expected `(\w+)[^`]*`(?: (>=|>|<=|<) (\S+))?", str(error))
    if found is None:
        return f"must be another value: {error}"
    kind = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}.get(found[1], found[1])
    bound = {">=": "of at least", ">": "above", "<=": "of at most", "<": "below"}.get(found[2] or "", "")
    return f"must be {kind}" + (f" {bound} {found[3].removesuffix('.0')}" if bound else "")


def _one_of(key: str, value: Any) -> tuple[str, str]:
    """Return 'must be one of' and the words of a setting that has a fixed list, and a question with the nearest one, or ''."""
    words = choices(key)
    near = difflib.get_close_matches(str(value), words, n=1)
    return f"must be one of {', '.join(words)}", f"did you mean '{near[0]}'?" if near else ""


def choices(key: str) -> tuple[str, ...]:
    """Return the values that setting `key` may have if they are a fixed list of words, else ()."""
    annotated: Any = FIELDS[key].type
    inner = get_args(annotated)[0] if get_args(annotated) else annotated
    return tuple(v for v in get_args(inner) if isinstance(v, str))


def read_toml(path: Path) -> dict[str, Any]:
    """Return the table in a TOML file. Raises UsageError if the file does not exist or is not valid."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}; --config takes the path of a TOML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}.") from None
