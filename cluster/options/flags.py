"""Joins flags and files into the user's choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import click
import msgspec
from click.core import ParameterSource

from roundtable.cluster.options.command import is_of_example
from roundtable.cluster.process.restart_policy import RestartPolicy
from roundtable.cluster.run.run_directory import is_folder_name
from roundtable.common.config.launching import name_of
from roundtable.common.config.old_names import with_new_names
from roundtable.common.config.settings import (
    COMMAND_LINE,
    FIELDS,
    Settings,
    check_values,
    in_words,
    make_settings,
    read_toml,
    refused,
    unknown_key,
)
from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage.run_files import RUNS

#: The key of `ctx.meta` with the values from files of the working directory.
FOUND = "roundtable.found"
#: Keys that a file given with --config may hold besides settings.
LAUNCH_KEYS: Mapping[str, Any] = {
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
    """The run that the user asked for. `run_dir` is None if neither a folder nor a name was given."""

    settings: Settings
    run_dir: Path | None
    overwrite: bool
    port: int
    script: str | None
    args: tuple[str, ...]
    restart_policy: RestartPolicy = field(default_factory=RestartPolicy)
    server_device: str = "cpu"

    @property
    def default_name(self) -> str:
        if self.script is not None:
            return name_of(self.script)
        return f"{self.settings.example.model}-{self.settings.example.data}".replace("/", "-")


def choose(
    flags: Mapping[str, Any],
    config: str | None,
    script: str | None = None,
    args: tuple[str, ...] = (),
    found: Mapping[str, Any] | None = None,
) -> Choice:
    """Return the user's choice: `flags`, the file `config`, and `found`, the values from files of the working directory.

    A flag beats `config`, and `config` beats `found`.

    Raises UsageError with one sentence for an unknown key, a wrong type, a value out of range or an impossible combination.
    """
    source, line = config or "", COMMAND_LINE
    from_file, launch_file = checked(read_toml(Path(source)), source) if config is not None else ({}, {})
    from_flags, launch_flags = checked(flags, line)
    where = f"{source} and {line}" if from_file and from_flags else source if from_file else line
    found = found or {}
    found_settings = {key: value for key, value in found.items() if key in FIELDS}
    settings = make_settings({**found_settings, **from_file, **from_flags}, where)
    launch = {**found, **launch_file, **launch_flags}
    if script is None:
        script, args = launch.get("script"), args or tuple(launch.get("args", ()))
    if args and script is None:
        raise UsageError("there are arguments but no SCRIPT before them: give roundtable local SCRIPT [ARGS].")
    run_dir = _run_dir(launch_flags, line) or _run_dir(launch_file, source) or _run_dir(found, "roundtable.toml")
    restart_policy = RestartPolicy(
        launch.get("max_restarts", RestartPolicy.times), launch.get("restart_delay", RestartPolicy.backoff_s)
    )
    port, device = launch.get("port", 0), launch.get("server_device", "cpu")
    return Choice(settings, run_dir, launch.get("overwrite", False), port, script, args, restart_policy, device)


def checked(values: Mapping[str, Any], where: str, others: Iterable[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings and the launcher's own keys among `values`. Errors may propose `others` too."""
    settings, launch = {}, {}
    for key, value in with_new_names(values, where).items():
        if key in LAUNCH_KEYS:
            try:
                launch[key] = msgspec.convert(value, LAUNCH_KEYS[key])
            except msgspec.ValidationError as error:
                raise refused(key, value, where, in_words(error)) from None
        elif key in FIELDS:
            settings[key] = value
        elif isinstance(value, dict):
            raise UsageError(f"{where}: [{key}] is not allowed: settings stand at the top of the file and not in tables.")
        else:
            raise unknown_key(key, sorted({*FIELDS, *LAUNCH_KEYS, *others}), where)
    return check_values(settings, where), launch


def _run_dir(launch: Mapping[str, Any], where: str) -> Path | None:
    folder, name = launch.get("run_dir"), launch.get("name")
    if folder is not None and name is not None:
        raise UsageError(f"{where}: give run_dir or name, not both; a name stands for the folder runs/NAME.")
    if name is not None:
        if not is_folder_name(name):
            raise UsageError(f"{where}: name must be the name of one folder (got {name!r}); use run_dir for a path.")
        return RUNS / str(name)
    if folder == "":
        raise UsageError(f"{where}: run_dir is empty; give a folder's path.")
    return Path(folder) if folder is not None else None


def given(ctx: click.Context) -> dict[str, Any]:
    """Return the options that the user gave on the command line or in the environment."""
    names = (FIELDS.keys() | LAUNCH_KEYS.keys()) - {"script"}
    sources = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return {key: value for key, value in ctx.params.items() if key in names and ctx.get_parameter_source(key) in sources}


def refuse_example_flags(ctx: click.Context, script: str | None) -> None:
    """Raise UsageError if there is a script and the user gave a flag that only the built-in example knows."""
    if script is None:
        return
    for key in given(ctx):
        if is_of_example(key) and ctx.get_parameter_source(key) == ParameterSource.COMMANDLINE:
            flag = "--" + key.replace("_", "-")
            raise UsageError(
                f"{flag} is a setting of the built-in example and has no effect on {script}; to pass it on to the script, put it "
                "after the script's name."
            )
