"""A model that a user names by FILE.py:FACTORY, a class or function that takes no arguments."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn

from roundtable.common.runtime.errors import UsageError


def load_factory(text: str) -> Callable[[], nn.Module]:
    """Return the function or class that FILE.py:FACTORY names, after checking that it makes a model.

    Raises UsageError if the file does not exist, or has nothing of that name that can be called without arguments. A result
    that is no model is an error too.
    """
    file, _, name = text.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise UsageError(f"{text}: there is no file {file or text}; a model of your own is named by FILE.py:FACTORY.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{text}: {file} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # as for a script: its imports may stand beside it
    try:
        spec.loader.exec_module(module)
        make: Callable[[], nn.Module] = getattr(module, name)
    except AttributeError as error:
        raise UsageError(f"{text} made no model: AttributeError: {file} has no function or class '{name}' ({error}).") from None
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UsageError(f"{text} made no model: {type(error).__name__}: {error}.") from None
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise UsageError(f"{text} made no model: {name} cannot be called without arguments: {error}.") from None
    try:
        made = make()
    except (Exception, SystemExit) as error:
        raise UsageError(f"{text} made no model: {type(error).__name__}: {error}.") from None
    if not isinstance(made, nn.Module):
        raise UsageError(f"{text} made a {type(made).__name__}, which is no torch.nn.Module.")
    return make
