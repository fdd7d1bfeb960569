"""Optimizers step without torch's compiler being imported, and it is there again for who wants it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from roundtable.common.runtime.skip_dynamo import no_compiler

pytestmark = pytest.mark.slow

PROGRAM = """
import inspect, sys
import torch
from roundtable.common.runtime.skip_dynamo import no_compiler

skipped = {"Optimizer", "LBFGS", "SparseAdam"}
classes = [c for name, c in vars(torch.optim).items() if inspect.isclass(c) and name not in skipped]
assert len(classes) > 10
with no_compiler():
    for cls in classes:
        for foreach in (False, True) if "foreach" in inspect.signature(cls).parameters else (None,):
            parameter = torch.ones(4, 4, requires_grad=True)
            optimizer = cls([parameter], **({} if foreach is None else {"foreach": foreach}))
            parameter.grad = torch.ones(4, 4)
            optimizer.step()
            assert not torch.equal(parameter, torch.ones(4, 4)), cls
            assert not any(name.startswith("torch._dynamo.") for name in sys.modules), cls
assert "torch._dynamo" not in sys.modules and "_dynamo" not in vars(torch)
assert "__dynamo_disable" not in vars(torch.optim.Optimizer.add_param_group.__wrapped__)
print("clean")

with no_compiler():
    hasattr(sys.modules["torch._dynamo"], "__file__")
    assert not any(name.startswith("torch._dynamo.") for name in sys.modules)
    assert torch._dynamo.is_compiling() is False  # more than to keep out: the real one
optimizer = torch.optim.SGD([torch.ones(2, requires_grad=True)])
optimizer.step()
real = sys.modules["torch._dynamo"]
assert real.__file__ and torch._dynamo is real
with no_compiler():
    assert sys.modules["torch._dynamo"] is real
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist())
"""


def test_optimizers_step_without_the_compiler_which_is_there_for_whoever_asks_for_it() -> None:
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:2] == ["clean", "[2.0, 2.0]"]


IMPORTS = """
import importlib, sys
import torch
from roundtable.common.runtime.skip_dynamo import no_compiler

with no_compiler():
    module = importlib.import_module(sys.argv[1])
name = sys.argv[1].rpartition(".")[2]
real = sys.modules["torch._dynamo"]
assert torch._dynamo is real and real.__file__
assert getattr(real, name) is module is sys.modules[sys.argv[1]]
assert module.__spec__.origin == module.__file__ and module.__loader__ is module.__spec__.loader
assert not any("no_compiler" in type(finder).__module__ for finder in sys.meta_path)
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist())
"""


@pytest.mark.parametrize("module", ["_trace_wrapped_higher_order_op", "profiler"])
def test_a_part_of_the_compiler_may_be_imported_meanwhile(module: str) -> None:
    """The first one is imported by the compiler itself, the second one is not."""
    root, name = Path(__file__).parents[2], f"torch._dynamo.{module}"
    result = subprocess.run([sys.executable, "-c", IMPORTS, name], cwd=root, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["[2.0,", "2.0]"]


def test_a_part_of_the_compiler_that_there_is_not_is_told_as_ever() -> None:
    with no_compiler(), pytest.raises(ModuleNotFoundError, match=r"torch\._dynamo\.nothing"):
        importlib.import_module("torch._dynamo.nothing")
