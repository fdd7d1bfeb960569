"""Reads options from files of the working directory: `roundtable.toml`, and the table [tool.roundtable] of `pyproject.toml`.

The command line beats the environment (`ROUNDTABLE_WORKERS` is --workers). The environment beats --config, --config beats
`roundtable.toml`, and `roundtable.toml` beats `pyproject.toml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from roundtable.cluster.options.command import Option
from roundtable.cluster.options.flags import FOUND, LAUNCH_KEYS, checked
from roundtable.common.config.old_names import with_new_names
from roundtable.common.config.settings import FIELDS, read_toml
from roundtable.common.runtime.errors import UsageError


def read_sources(folder: Path, options: Mapping[str, click.Parameter]) -> dict[str, Any]:
    """Return the values that files in `folder` give `options`, settings, and a script and its arguments.

    Raises UsageError, which names the file and the key, for an unknown key and for a wrong value.
    """
    found: dict[str, Any] = {}
    for file in (folder / "pyproject.toml", folder / "roundtable.toml"):
        if file.is_file():
            found |= _read(file, options)
    return found


def _read(file: Path, options: Mapping[str, click.Parameter]) -> dict[str, Any]:
    table, where = read_toml(file), file.name
    if file.name == "pyproject.toml":
        table, where = table.get("tool", {}).get("roundtable", {}), f"[tool.roundtable] of {file.name}"
        if not isinstance(table, dict):
            raise UsageError(f"{where} must be a table.")
    values = with_new_names(table, where)
    others = {key: values.pop(key) for key in list(values) if key in options.keys() - FIELDS.keys() - LAUNCH_KEYS.keys()}
    settings, launch = checked(values, where, options)
    for key, value in others.items():
        try:
            options[key].type.convert(value, options[key], None)
        except click.BadParameter as error:
            raise UsageError(f"{where}: {key} = {value!r} is refused: {error.message}") from None
    return {**others, **settings, **launch}


def use_sources(ctx: click.Context, commands: Mapping[str, click.Command], folder: Path) -> None:
    """Make the values in the files of `folder` the defaults of options of `commands`, which are subcommands of `ctx`."""
    may_be_set = {name: [option for option in command.params if _may_be_set(option)] for name, command in commands.items()}
    options = {option.name or "": option for params in may_be_set.values() for option in params}
    found = read_sources(folder, options)
    ctx.meta[FOUND] = found
    flags = {name: {option.name for option in params} - {"script"} for name, params in may_be_set.items()}
    ctx.default_map = {name: {key: value for key, value in found.items() if key in flags[name]} for name in commands}


def _may_be_set(option: click.Parameter) -> bool:
    """Return whether files may set an option: not if it is hidden, nor if a command is about it, as `scale` about --workers."""
    if option.name == "module":  # a file says `script = "-m package.module"`
        return False
    return not getattr(option, "hidden", False) and (isinstance(option, Option) or not option.required)
