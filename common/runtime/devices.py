"""Devices by their names."""

from __future__ import annotations

import torch

from roundtable.common.runtime.errors import UsageError


def find_device(name: str, setting: str) -> torch.device:
    """Return the device called `name`, such as cpu or cuda:0. Raise UsageError, which names `setting`, if it is not here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # torch's own text is long, and about how torch was built
        count = torch.cuda.device_count()
        raise UsageError(
            f"{setting}: device '{name}' is not available here; torch finds the CPU and {count} CUDA device(s)."
        ) from None
    return device
