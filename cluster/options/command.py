"""Commands and options of click as this program has them.

Options are made from the fields of `Settings`, stand in sections of the help text, and have hidden names. The script
gets the arguments after SCRIPT.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any, get_args, get_origin

import click
import msgspec

from roundtable.common.config.old_names import OLD_NAMES, new_value
from roundtable.common.config.settings import EXAMPLE_FIELDS, FIELDS, choices
from roundtable.common.network.addresses import to_advertise, whole

#: The object of a context whose process the launcher has started.
CHILD = "child"
EXAMPLE = "Built-in example (without SCRIPT)"
#: The sections of the help text. `--help` shows the first section, `--help-all` shows all of them.
_SECTIONS: Mapping[str, tuple[str, ...]] = {
    "Common options": (
        "workers", "servers", "policy", "global_batch", "epochs", "checkpoint_every", "name", "resume", "config", "progress",
        "quiet", "tee", "module",
    ),
    "Batch and length": ("micro_batch", "rounds", "seed", "threads"),
    "Policy": (
        "max_staleness", "backup_micro_batches", "local_steps", "local_after", "outer_lr", "outer_momentum",
        "average_weights_by", "staleness_lr", "delay_compensation",
    ),
    "Checkpoints and run directory": ("keep_checkpoints", "run_dir", "overwrite", "allow_version_mismatch"),
    "Fault tolerance": (
        "replicas", "max_restarts", "restart_delay", "worker_failures", "on_nonfinite", "heartbeat_timeout", "progress_timeout",
        "coordinator_timeout", "start_timeout", "stop_timeout", "stack_dump_after",
    ),
    "Network and memory": (
        "transport", "compress_gradients", "compress_weights", "topk_ratio", "port", "listen", "server_device",
        "kv_memory",
    ),
}  # fmt: skip
#: The beginning of the names of environment variables that give options.
_PREFIX = "ROUNDTABLE_"
_ADDRESS = re.compile(r"tcp://(?:\[[^\]]+\]|[^:/\[\]\s]+):(\d+)")


def is_of_example(key: str) -> bool:
    """Return whether the setting `key` is one of the built-in example, which no other script reads."""
    return key in EXAMPLE_FIELDS


class Words(click.Choice[str]):
    """A choice among words, in upper or lower case."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        words = {str(word).lower(): str(word) for word in self.choices}
        if (lower := str(value).lower()) in words:
            return words[lower]
        near = difflib.get_close_matches(lower, words, n=1)
        hint = f"; did you mean '{words[near[0]]}'?" if near else "."
        self.fail(f"'{value}' is not one of {', '.join(map(repr, words.values()))}{hint}", param, ctx)


class Option(click.Option):
    """An option that the environment variable ROUNDTABLE_NAME and hidden flags may set too.

    Hidden flags are its old names, from `OLD_NAMES` and `old`, and names that other programs use (`also`). A process that the
    launcher has started takes no options from the environment, because the environment is the launcher's.
    """

    def __init__(self, *args: Any, old: Sequence[str] = (), also: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        before = ["--" + before.replace("_", "-") for before, name in OLD_NAMES.items() if name == self.name]
        self._old = frozenset([*before, *old])
        self._hidden = [*before, *old, *also]
        if self.envvar is None and self.name is not None:
            self.envvar = _PREFIX + self.name.upper()

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        return None if ctx.find_root().obj == CHILD else super().resolve_envvar_value(ctx)

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        super().add_to_parser(parser, ctx)
        for flag in self._hidden:
            kind: dict[str, Any] = {"action": "store_const", "const": True} if self.is_flag else {"action": "store"}
            parser.add_option(obj=self, opts=[flag], dest=flag, **kind)

    def handle_parse_result(self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]) -> tuple[Any, list[str]]:
        """Parse this option. A value that a hidden flag gives counts as its own."""
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
    """A command whose options stand before SCRIPT, if it takes one.

    The arguments after SCRIPT, or after `--`, are in `ctx.meta["args"]`. If the command has many options, `--help` shows the
    common ones.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._has_sections = any(option.name == "config" for option in self.params)
        if self._has_sections:
            shows = click.Option(
                ["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_help_all, help="Show all options."
            )
            self.params.append(shows)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest: list[str] = []
        if self._takes_script:
            args, rest = self._split(ctx, args)
        ctx.meta["args"] = tuple(rest)
        return super().parse_args(ctx, args)

    @property
    def _takes_script(self) -> bool:
        return any(parameter.name == "script" for parameter in self.params)

    def _split(self, ctx: click.Context, args: list[str]) -> tuple[list[str], list[str]]:
        """Return this command's own arguments, SCRIPT included, and those of the script."""
        parser = self.make_parser(ctx)
        parser.allow_interspersed_args = False
        found, left, _ = parser.parse_args(list(args))
        has_script = found.get("script") is not None and found["script"] in args  # else click's mark for none
        own = len(args) - len(left) - has_script
        if own and args[own - 1] == "--":
            return args[: own - 1], args[own:]
        rest = args[own + 1 :]
        return args[: own + 1], rest[1:] if rest[:1] == ["--"] else rest

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        pieces = super().collect_usage_pieces(ctx)
        return [*pieces, "[ARGS...]"] if "[SCRIPT]" in pieces else pieces

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if not self._has_sections:
            super().format_options(ctx, formatter)
            return
        sections: dict[str, list[tuple[str, str]]] = {section: [] for section in (*_SECTIONS, EXAMPLE, "Other")}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections[_section(parameter.name or "")].append(record)
        common = next(iter(_SECTIONS))
        for section, records in sections.items():
            if records and (ctx.meta.get("help_all") or section in (common, "Other")):
                with formatter.section(section):
                    formatter.write_dl(records, col_max=24)


def _help_all(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta["help_all"] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


def _section(key: str) -> str:
    if is_of_example(key):
        return EXAMPLE
    return next((section for section, keys in _SECTIONS.items() if key in keys), "Other")


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command function one option for each field of Settings."""
    for key in reversed(FIELDS):
        command = _option_of(key)(command)
    return command


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command function the options that say where a run is kept."""
    for flag, text, extra in (
        ("--overwrite", "Replace an existing run.", {"is_flag": True}),
        ("--name", "Name of the run: short for --run-dir runs/NAME.", {"metavar": "NAME"}),
        ("--run-dir", "Folder for the model, the summary, the event log and the logs.", {"metavar": "DIR"}),
        ("--config", "Read settings from a TOML file. Flags override it.", {"metavar": "FILE"}),
    ):
        command = click.option(flag, cls=Option, help=text, **extra)(command)
    return command


def _option_of(key: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    kind, text = _plain_type(FIELDS[key].type), _description(key)
    flag = "--" + key.replace("_", "-")
    common: dict[str, Any] = {
        "cls": Option,
        "help": text[0].upper() + text[1:],
        "default": FIELDS[key].default,
        "show_default": FIELDS[key].default is not None,
    }
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", **{**common, "show_default": FIELDS[key].default is True})
    if choices(key):
        return click.option(flag, type=Words(choices(key)), **common)
    special = {"init": "FILE", "image": "CxHxW", "column_devices": "A,B"}
    metavar = {int: "N", float: "X"}.get(kind, "DIR" if key.endswith("_dir") else special.get(key, "NAME"))
    if key == "workers":
        common["also"] = ["-n", "--nproc-per-node"]
    return click.option(flag, type=kind, metavar=metavar, **common)


def _description(key: str) -> str:
    metas = get_args(FIELDS[key].type)[1:]
    return " ".join(meta.description for meta in metas if isinstance(meta, msgspec.Meta) and meta.description)


def _plain_type(annotation: Any) -> type:
    """Return int, float, bool or str: a field's type without its bounds and None. For a list of words, return str."""
    while not inspect.isclass(annotation):
        inner = [part for part in get_args(annotation) if part is not NoneType]
        if get_origin(annotation) is None or isinstance(inner[0], str):
            return str
        annotation = inner[0]
    return annotation


def whole_address(ctx: click.Context, option: click.Parameter, value: str) -> str:
    """Return the coordinator's address that an option gives as HOST, HOST:PORT or tcp://HOST:PORT, in the last form."""
    return check_address(ctx, option, whole(value))


def check_address(ctx: click.Context, option: click.Parameter, value: str) -> str:
    """Return the value of an option that takes tcp://HOST:PORT, or raise. ZeroMQ itself would take port 100000 for 34464."""
    found = _ADDRESS.fullmatch(value)
    if found is None:
        raise click.BadParameter(f"expected tcp://HOST:PORT, got '{value}'.")
    if int(found[1]) > 65535:
        raise click.BadParameter(f"the port in '{value}' is above 65535.")
    return value


def check_advertised(ctx: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Return the value of an option that takes HOST, HOST:PORT or tcp://HOST:PORT, or raise."""
    if value is not None:
        to_advertise(value, "tcp://*:0")
    return value
