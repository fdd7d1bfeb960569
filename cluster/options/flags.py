"""The command line's options, made from the fields of `Settings`, and what the user chose by them or by a file."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import click
import msgspec
from click.core import ParameterSource

from roundtable.cluster.process.restart_policy import RestartPolicy
from roundtable.cluster.run.run_directory import is_folder_name
from roundtable.common.config.old_names import OLD_NAMES, new_value, with_new_names
from roundtable.common.config.settings import FIELDS, Settings, check_values, choices, make_settings, read_toml, unknown_key
from roundtable.common.network.addresses import as_told
from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage.run_files import RUNS

_EXAMPLE = "Built-in example"
_SECTIONS = ("Cluster", "Training", "Policy", _EXAMPLE, "Run", "Other")
_CLUSTER = (
    "workers", "servers", "threads", "transport", "checkpoint_every", "keep_checkpoints", "replicas", "kv_memory",
    "heartbeat_timeout", "progress_timeout", "worker_failures", "start_timeout", "stop_timeout", "coordinator_timeout",
)  # fmt: skip
_POLICIES = choices("policy")
_ADDRESS = re.compile(r"tcp://(?:\[[^\]]+\]|[^:/\[\]\s]+):(\d+)")

#: What a file given with --config may hold besides settings.
_LAUNCH_KEYS: Mapping[str, Any] = {
    "run_dir": str,
    "name": str,
    "overwrite": bool,
    "port": Annotated[int, msgspec.Meta(ge=0, le=65535)],
    "max_restarts": Annotated[int, msgspec.Meta(ge=0)],
    "restart_delay": Annotated[float, msgspec.Meta(ge=0)],
    "server_device": str,
    "script": str,
    "args": list[str],
}


@dataclass(frozen=True)
class Choice:
    """What the user asked for. `run_dir` is None where neither a folder nor a name was given."""

    settings: Settings
    run_dir: Path | None
    overwrite: bool
    port: int
    script: str | None
    args: tuple[str, ...]
    respawn: RestartPolicy = field(default_factory=RestartPolicy)
    server_device: str = "cpu"

    @property
    def default_name(self) -> str:
        if self.script is not None:
            return Path(self.script).stem
        return f"{self.settings.model}-{self.settings.data}".replace("/", "-")


def choose(flags: Mapping[str, Any], config: str | None, script: str | None = None, args: tuple[str, ...] = ()) -> Choice:
    """Join the flags that were given with the table in the file `config`; a flag beats the file.

    Raises UsageError with one sentence for an unknown key, a wrong type, a value out of range or an impossible combination.
    """
    source, line = config or "", "the command line"
    from_file, launch_file = _checked(read_toml(Path(source)), source) if config is not None else ({}, {})
    from_flags, launch_flags = _checked(flags, line)
    where = f"{source} and {line}" if from_file and from_flags else source if from_file else line
    settings = make_settings({**from_file, **from_flags}, where)
    launch = {**launch_file, **launch_flags}
    if script is None:
        script, args = launch.get("script"), args or tuple(launch.get("args", ()))
    if args and script is None:
        raise UsageError("arguments go to a script, but no SCRIPT was given before the --.")
    run_dir = _run_dir(launch_flags, line) or _run_dir(launch_file, source)
    respawn = RestartPolicy(launch.get("max_restarts", RestartPolicy.times), launch.get("restart_delay", RestartPolicy.backoff_s))
    port, device = launch.get("port", 0), launch.get("server_device", "cpu")
    return Choice(settings, run_dir, launch.get("overwrite", False), port, script, args, respawn, device)


def _checked(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and the launcher's own keys among `values`."""
    settings, launch = {}, {}
    for key, value in with_new_names(values, where).items():
        if key in _LAUNCH_KEYS:
            try:
                launch[key] = msgspec.convert(value, _LAUNCH_KEYS[key])
            except msgspec.ValidationError as error:
                text = str(error).replace("`", "")
                raise UsageError(f"{where}: {key} = {value!r} cannot be: {text[0].lower()}{text[1:]}.") from None
        elif key in FIELDS:
            settings[key] = value
        elif isinstance(value, dict):
            raise UsageError(f"{where}: [{key}] cannot be: settings stand at the top of the file and not in tables.")
        else:
            raise unknown_key(key, sorted([*FIELDS, *_LAUNCH_KEYS]), where)
    return check_values(settings, where), launch


def _run_dir(launch: Mapping[str, Any], where: str) -> Path | None:
    folder, name = launch.get("run_dir"), launch.get("name")
    if folder is not None and name is not None:
        raise UsageError(f"{where}: give run_dir or name, not both; a name stands for the folder runs/NAME.")
    if name is not None:
        if not is_folder_name(name):
            raise UsageError(f"{where}: name = {name!r} cannot be: a name is one folder's name; use run_dir for a path.")
        return RUNS / str(name)
    if folder == "":
        raise UsageError(f"{where}: run_dir is empty; give a folder's path.")
    return Path(folder) if folder is not None else None


def given(ctx: click.Context) -> dict[str, Any]:
    """The options that the user gave, without those that were left at their defaults."""
    names = (FIELDS.keys() | _LAUNCH_KEYS.keys()) - {"script"}
    source = ctx.get_parameter_source
    return {key: value for key, value in ctx.params.items() if key in names and source(key) == ParameterSource.COMMANDLINE}


def check_address(ctx: click.Context, option: click.Parameter, value: str) -> str:
    """The callback of an option that takes tcp://HOST:PORT: ZeroMQ itself would take port 100000 for 34464."""
    found = _ADDRESS.fullmatch(value)
    if found is None:
        raise click.BadParameter(f"'{value}' is no address; it looks like tcp://HOST:PORT.")
    if int(found[1]) > 65535:
        raise click.BadParameter(f"'{value}' is no address: a port is at most 65535.")
    return value


def check_advertised(ctx: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """The callback of an option that takes HOST, HOST:PORT or tcp://HOST:PORT."""
    if value is not None:
        as_told(value, "tcp://*:0")
    return value


class Option(click.Option):
    """An option in a section of the help text, which hidden flags may give too: old names, and names that other programs use.

    The old names are those of `OLD_NAMES`, and `old`.
    """

    def __init__(
        self, *args: Any, section: str = "Other", old: Sequence[str] = (), also: Sequence[str] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.section = section
        before = ["--" + before.replace("_", "-") for before, name in OLD_NAMES.items() if name == self.name]
        self._old = frozenset([*before, *old])
        self._hidden = [*before, *old, *also]

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        super().add_to_parser(parser, ctx)
        for flag in self._hidden:
            kind: dict[str, Any] = {"action": "store_const", "const": True} if self.is_flag else {"action": "store"}
            parser.add_option(obj=self, opts=[flag], dest=flag, **kind)

    def handle_parse_result(self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]) -> tuple[Any, list[str]]:
        """Take a value that was given by a hidden flag as this option's own."""
        found = dict(opts)
        for flag in self._hidden:
            if flag not in found:
                continue
            if self.name in found:
                raise click.UsageError(f"{flag} and {self.opts[0]} are one option: give {self.opts[0]} alone.", ctx)
            found[str(self.name)] = new_value(flag.removeprefix("--").replace("-", "_"), found.pop(flag))
            if flag in self._old:
                click.echo(f"warning: {flag} is now called {self.opts[0]}; the next release drops the old name.", err=True)
        return super().handle_parse_result(ctx, found, args)


class Command(click.Command):
    """A command whose help text has its options in sections, and which keeps what follows `--` for a script.

    That is in `ctx.meta["args"]`, so that it reaches the script even if the script itself is named by a file.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest: list[str] = []
        if "script" in (parameter.name for parameter in self.params) and "--" in args:
            at = args.index("--")
            args, rest = args[:at], args[at + 1 :]
        ctx.meta["args"] = tuple(rest)
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        pieces = super().collect_usage_pieces(ctx)
        return [*pieces, "[-- ARGS...]"] if "[SCRIPT]" in pieces else pieces

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {section: [] for section in _SECTIONS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                rows[getattr(parameter, "section", "Other")].append(record)
        only = sum(map(bool, rows.values())) == 1
        for section, records in rows.items():
            if records:
                title = f"{_EXAMPLE} (without SCRIPT)" if section == _EXAMPLE else "Options" if only else section
                with formatter.section(title):
                    formatter.write_dl(records, col_max=24)


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command function one option for each field of Settings."""
    for key in reversed(FIELDS):
        command = _option_of(key)(command)
    return command


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command function the options that say where a run is kept."""
    for flag, text, extra in (
        ("--overwrite", "Replace a finished run in that folder.", {"is_flag": True}),
        ("--name", "Short for --run-dir runs/NAME.", {"metavar": "NAME"}),
        ("--run-dir", "Folder for the model, the summary, the event log and the logs.", {"metavar": "DIR"}),
        ("--config", "TOML file with the same names as the flags; a flag beats the file.", {"metavar": "FILE"}),
    ):
        command = click.option(flag, cls=Option, section="Run", help=text, **extra)(command)
    return command


def _option_of(key: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    kind, text = _plain_type(FIELDS[key].type), _description(key)
    section, flag = _section(key, text), "--" + key.replace("_", "-")
    text = text.removeprefix(f"{_EXAMPLE}: ")
    common: dict[str, Any] = {
        "cls": Option,
        "section": section,
        "help": text[0].upper() + text[1:] if section == _EXAMPLE else text,
        "default": FIELDS[key].default,
        "show_default": FIELDS[key].default is not None,
    }
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", **{**common, "show_default": FIELDS[key].default is True})
    if choices(key):
        return click.option(flag, type=click.Choice(choices(key)), **common)
    special = {"init": "FILE", "image": "CxHxW", "column_devices": "A,B"}
    metavar = {int: "N", float: "X"}.get(kind, "DIR" if key.endswith("_dir") else special.get(key, "NAME"))
    if key == "workers":
        common["also"] = ["-n", "--nproc-per-node"]
    return click.option(flag, type=kind, metavar=metavar, **common)


def _section(key: str, text: str) -> str:
    before = text.partition(":")[0]
    if before == _EXAMPLE:
        return _EXAMPLE
    if key == "policy" or (before != text and all(word in _POLICIES for word in before.split(", "))):
        return "Policy"
    return "Cluster" if key in _CLUSTER else "Training"


def _description(key: str) -> str:
    metas = get_args(FIELDS[key].type)[1:]
    return " ".join(meta.description for meta in metas if isinstance(meta, msgspec.Meta) and meta.description)


def _plain_type(annotation: Any) -> type:
    """int, float, bool or str: what is left of a field's type without its bounds, None and lists of words."""
    while not inspect.isclass(annotation):
        inner = [part for part in get_args(annotation) if part is not NoneType]
        if get_origin(annotation) is None or isinstance(inner[0], str):
            return str
        annotation = inner[0]
    return annotation
