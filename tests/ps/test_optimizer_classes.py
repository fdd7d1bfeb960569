"""A server runs optimizer classes of torch.optim, and of modules that it was told to trust."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from roundtable.common.protocol.messages.setup import Update
from roundtable.common.runtime.errors import WireError
from roundtable.ps.params.optimizer_classes import class_named, import_classes

MODULE = "from torch.optim import SGD\nclass Mine(SGD): pass\nclass Other: pass\n"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_optimizers.py").write_text(MODULE)
    (tmp_path / "broken_optimizers.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_optimizers", "broken_optimizers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "my_optimizers"


def update(*names: str) -> Update:
    return Update(names[0], [{} for _ in names], classes=list(names))


@pytest.mark.parametrize("trusts", [["my_optimizers"], ["*"]])
def test_a_class_of_a_trusted_module_is_found(module: str, trusts: list[str]) -> None:
    import_classes(update("AdamW", f"{module}.Mine"), trusts)
    assert class_named(f"{module}.Mine").__mro__[1] is torch.optim.SGD
    assert class_named("AdamW") is torch.optim.AdamW


@pytest.mark.parametrize("trusts", [[], ["my"], ["my_optimizers.deeper"], ["other"]])
def test_a_module_that_is_not_trusted_is_not_imported(module: str, trusts: list[str]) -> None:
    with pytest.raises(WireError, match="not one that this server trusts: start it with --trust-optimizers my_optimizers"):
        import_classes(update("SGD", f"{module}.Mine"), trusts)
    assert module not in sys.modules


def test_a_module_that_cannot_be_imported_is_named(module: str) -> None:
    with pytest.raises(WireError, match=r"broken_optimizers.Mine cannot be imported on this server: ZeroDivisionError"):
        import_classes(update("broken_optimizers.Mine"), ["*"])


@pytest.mark.parametrize("name", ["Nothing", "lr_scheduler", "Optimizer2", "my_optimizers.Other", "my_optimizers.torch", None])
def test_what_is_no_optimizer_is_not_found(module: str, name: str | None) -> None:
    import_classes(update(f"{module}.Mine"), ["*"])
    with pytest.raises(ValueError, match="has no optimizer"):
        class_named(name)
