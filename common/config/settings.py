"""The one definition of what can be set about a run.

Flags, TOML keys, the coordinator's WELCOME and the summary are all made from `Settings`; nothing else names them.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from roundtable.common.config.field_types import Name, Text
from roundtable.common.config.old_names import with_new_names
from roundtable.common.runtime.errors import UsageError

#: What errors call the place of settings that flags gave.
COMMAND_LINE = "the command line"
#: Seconds for all processes of a run to start and find each other, by default.
START_S = 600.0

Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]
PolicyName = Literal["sync", "backup", "ssp", "async", "local", "average"]
MergeName = Literal["uniform", "samples", "greedy"]
PushCodec = Literal["none", "bf16", "fp16", "int8", "onebit", "topk"]
WeightCodec = Literal["none", "bf16", "fp16", "int8", "onebit"]
ModelName = Literal["lenet", "mlp", "cnn", "alexnet", "alexnet-2012", "alexnet-text"]
DataName = Literal["mnist-5k", "digits", "mnist", "fashion-mnist", "cifar-10", "folder", "synthetic"]
#: Those that servers can apply: classes of torch.optim that need no closure.
OptimizerName = Literal[
    "SGD", "Adam", "AdamW", "Adadelta", "Adagrad", "Adamax", "ASGD", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SparseAdam",
]  # fmt: skip
ScheduleName = Literal["CosineAnnealingLR", "OneCycleLR", "LinearLR", "none"]
#: Data sources that read files, from the folder that --data-dir names.
READ_FILES = frozenset({"mnist", "fashion-mnist", "cifar-10", "folder"})


def _help(text: str) -> Meta:
    return Meta(description=text)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about a run that its processes must agree on. Field descriptions are the flags' help texts."""

    workers: Annotated[Positive, _help("Worker processes, each with a replica of the model.")] = 2
    servers: Annotated[Positive, _help("Parameter servers, among which the parameters are divided.")] = 2
    policy: Annotated[
        PolicyName,
        _help(
            "sync: all workers, every round, reproducible; backup: skip the slowest micro-batches; ssp: bounded staleness; "
            "async: no waiting; local: local SGD; average: train apart, average at the end."
        ),
    ] = "sync"
    global_batch: Annotated[Positive, _help("Samples per round, over all workers.")] = 64
    micro_batch: Annotated[Positive, _help("Samples per micro-batch, the unit of work handed to a worker.")] = 16
    epochs: Annotated[Positive, _help("Passes over the training data.")] = 10
    rounds: Annotated[Positive | None, _help("Stop after this many rounds, even in the middle of an epoch.")] = None
    seed: Annotated[NonNegative, _help("Seed of weights, data order, augmentation and dropout.")] = 0
    threads: Annotated[Positive, _help("Torch threads per worker. Changing it may change results in the last bits.")] = 1

    transport: Annotated[
        Literal["auto", "tcp"],
        _help("auto uses shared memory on one host and TCP otherwise; tcp always uses TCP."),
    ] = "auto"
    compress_gradients: Annotated[
        PushCodec, _help("Compress gradients sent over TCP. No effect over shared memory: see --transport.")
    ] = "none"
    compress_weights: Annotated[
        WeightCodec, _help("Compress weights sent to workers, shared memory included. int8 and onebit send differences.")
    ] = "none"
    topk_ratio: Annotated[float, Meta(gt=0, le=1), _help("topk: share of the elements that is sent.")] = 0.01

    checkpoint_every: Annotated[
        float,
        Meta(ge=0),
        _help("Seconds between checkpoints; 0 disables them, including the final one."),
    ] = 60.0
    keep_checkpoints: Annotated[int, Meta(ge=2), _help("Number of newest checkpoints to keep.")] = 2
    replicas: Annotated[
        int,
        Meta(ge=0, le=1),
        _help(
            "Backup copies of each server (sync, backup only). With 1, losing a server costs no rounds but doubles server memory."
        ),
    ] = 0

    kv_memory: Annotated[
        Positive, _help("Key-value store: MiB of memory that each server has for it at most, keys included.")
    ] = 1024

    max_staleness: Annotated[NonNegative, _help("ssp: rounds by which a worker may lead the slowest.")] = 2
    backup_micro_batches: Annotated[NonNegative, _help("backup: micro-batches per round that may be skipped.")] = 1
    local_steps: Annotated[Positive, _help("local: steps each worker takes between two merges.")] = 8
    local_after: Annotated[NonNegative, _help("local: start local SGD after this many synchronous rounds; 0 = at once.")] = 0
    outer_lr: Annotated[PositiveFloat, _help("local: learning rate of the outer optimizer.")] = 0.7
    outer_momentum: Annotated[float, Meta(ge=0, lt=1), _help("local: Nesterov momentum of the outer optimizer.")] = 0.3
    average_weights_by: Annotated[
        MergeName,
        _help("average: weighting of the workers: by samples, uniform, or greedy, which keeps those that help on held-out data."),
    ] = "samples"
    staleness_lr: Annotated[bool, _help("ssp, async: divide the rate by the staleness of the push; the mean rate stays.")] = False
    delay_compensation: Annotated[
        float, Meta(ge=0), _help("ssp, async: weight of the delay-compensation term (DC-ASGD); 0 is off.")
    ] = 0.0

    model: Annotated[ModelName, _help("Built-in example: the network.")] = "lenet"
    parallel: Annotated[
        Literal["data", "hybrid"],
        _help("Built-in example: hybrid has the fully connected layers on the servers, which compute them."),
    ] = "data"
    data: Annotated[DataName, _help("Built-in example: the images.")] = "mnist-5k"
    data_dir: Annotated[Text | None, _help("Built-in example: folder that holds the images, where --data needs one.")] = None
    init: Annotated[
        Text | None, _help("Built-in example: file with weights to start from, safetensors or a state_dict of torch.save.")
    ] = None
    image: Annotated[
        Name | None, _help("Built-in example: size of the images, where --data is synthetic or folder: 3x224x224, say.")
    ] = None
    classes: Annotated[Positive | None, _help("Built-in example: number of classes, where --data is synthetic.")] = None
    column_devices: Annotated[
        Name | None, _help("Built-in example: devices of both columns of alexnet-2012 or alexnet-text, such as cuda:0,cuda:1.")
    ] = None
    loss: Annotated[Literal["cross-entropy", "mse"], _help("Built-in example: the loss; mse is against one-hot targets.")] = (
        "cross-entropy"
    )
    optimizer: Annotated[OptimizerName, _help("Built-in example: a class of torch.optim.")] = "SGD"
    lr: Annotated[PositiveFloat, _help("Built-in example: learning rate.")] = 0.02
    momentum: Annotated[float, Meta(ge=0, lt=1), _help("Built-in example: momentum, where the optimizer has one.")] = 0.9
    weight_decay: Annotated[float, Meta(ge=0), _help("Built-in example: weight decay.")] = 0.0
    clip_norm: Annotated[PositiveFloat | None, _help("Built-in example: clip the gradient to this global norm.")] = None
    schedule: Annotated[ScheduleName, _help("Built-in example: learning-rate schedule.")] = "CosineAnnealingLR"
    num_data_workers: Annotated[NonNegative, _help("Built-in example: processes that load data, per worker.")] = 0

    on_nonfinite: Annotated[
        Literal["fail", "skip", "allow"],
        _help("On a NaN or infinite gradient: fail = stop the run, skip = drop that update, allow = apply it."),
    ] = "fail"
    stack_dump_after: Annotated[
        float,
        Meta(ge=0),
        _help("Dump stack traces to the log after this many seconds without progress; 0 disables."),
    ] = 60.0
    heartbeat_timeout: Annotated[
        PositiveFloat | None,
        _help("Declare a process dead after so many seconds without a heartbeat. By default 3 for local workers, 15 otherwise."),
    ] = None
    progress_timeout: Annotated[
        float,
        Meta(gt=0),
        _help("Abort the run after this many seconds without progress."),
    ] = 300.0

    worker_failures: Annotated[
        NonNegative,
        _help(
            "Workers that may fail in mid-training without failing the run; other workers redo their work. A worker that fails "
            "before its first committed round does not count."
        ),
    ] = 0

    start_timeout: Annotated[
        float,
        Meta(gt=0),
        _help("Seconds for all servers and workers to connect, and then for the first worker to reach its first batch."),
    ] = START_S

    stop_timeout: Annotated[
        float,
        Meta(gt=0),
        _help(
            "Seconds in which a run that is told to stop (Ctrl-C or SIGTERM) ends the round and makes a checkpoint. A second "
            "signal stops it at once."
        ),
    ] = 25.0

    coordinator_timeout: Annotated[
        float,
        Meta(gt=0),
        _help("Seconds that servers and workers wait for a lost coordinator to come back."),
    ] = 60.0

    def __post_init__(self) -> None:
        for key in self.__struct_fields__:
            value = getattr(self, key)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{key} is {value}: it must be a number that is not infinite.")
        if self.micro_batch > self.global_batch:
            raise UsageError(
                f"micro_batch is {self.micro_batch} but global_batch is only {self.global_batch}: "
                "a micro-batch is a part of the global batch, so make it no larger."
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
        if self.image is not None:
            parse_shape(self.image)
        if self.parallel == "hybrid" and self.loss != "cross-entropy":
            raise UsageError(
                f"loss is {self.loss} but parallel is hybrid, and servers compute cross-entropy: choose one of the two."
            )
        if self.parallel == "hybrid" and self.column_devices is not None:
            raise UsageError(
                f"column_devices is {self.column_devices} but parallel is hybrid: fully connected layers are on two devices or "
                "on the servers, so choose one of the two."
            )

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


def parse_shape(text: str) -> tuple[int, int, int]:
    """(channels, height, width) of "3x224x224". Raises UsageError for anything else."""
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if found is None:
        raise UsageError(f"image is '{text}': it must be channels x height x width, such as 3x224x224.")
    return int(found[1]), int(found[2]), int(found[3])


FIELDS: dict[str, msgspec.structs.FieldInfo] = {f.name: f for f in msgspec.structs.fields(Settings)}


def unknown_key(key: str, known: list[str], where: str) -> UsageError:
    """The error for a key nobody knows, with the nearest known one."""
    near = difflib.get_close_matches(key, known, n=1)
    return UsageError(f"{where}: there is no setting '{key}'" + (f"; did you mean '{near[0]}'?" if near else "."))


def make_settings(values: dict[str, Any], where: str) -> Settings:
    """Check `values` and build Settings from them; `where` (a file, 'the command line') is named in errors.

    Raises UsageError with one sentence for an unknown key, a wrong type, a value out of range or an impossible combination.
    """
    return msgspec.convert(check_values(values, where), Settings)


def check_values(values: dict[str, Any], where: str) -> dict[str, Any]:
    """`values` with underscores in their keys, each checked by itself, as part of what `make_settings` will get."""
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
            raise refused(key, value, where, _one_of(key, value) or in_words(error)) from None
    return values


def refused(key: str, value: Any, where: str, why: str) -> UsageError:
    """Return the error for a value that a setting cannot have. A flag is named as it is typed."""
    if where == COMMAND_LINE:
        return UsageError(f"--{key.replace('_', '-')} {value} cannot be: {why}")
    return UsageError(f"{where}: {key} = {value!r} cannot be: {why}")


def in_words(error: msgspec.ValidationError) -> str:
    """Return a sentence on what was expected."""
    found = re.match(r"Expected `(\w+)[^`]*`(?: (>=|>|<=|<) (\S+))?", str(error))
    if found is None:
        return f"{error}."
    kind = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}.get(found[1], found[1])
    bound = {">=": "of at least", ">": "above", "<=": "of at most", "<": "below"}.get(found[2] or "", "")
    return f"it must be {kind}" + (f" {bound} {found[3].removesuffix('.0')}." if bound else ".")


def _one_of(key: str, value: Any) -> str:
    """Return a sentence on the words that a setting may have, if these are a fixed list; else ''."""
    if not (words := choices(key)):
        return ""
    near = difflib.get_close_matches(str(value), words, n=1)
    return f"it must be one of {', '.join(words)}" + (f"; did you mean '{near[0]}'?" if near else ".")


def choices(key: str) -> tuple[str, ...]:
    """Return the values that setting `key` may have if they are a fixed list of words, else ()."""
    annotated: Any = FIELDS[key].type
    inner = get_args(annotated)[0] if get_args(annotated) else annotated
    return tuple(v for v in get_args(inner) if isinstance(v, str))


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file. Raises UsageError where there is none or it does not parse."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}; --config takes the path of a TOML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}.") from None
