"""Devices by their names."""

from __future__ import annotations

import torch

from roundtable.common.runtime.errors import UsageError


def find_device(name: str, setting: str) -> torch.device:
    """Return the device called `name`, such as cpu or cuda:0. Raise UsageError, which names `setting`, if it is not here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # torch's own words are many, and about how it was built
        count = torch.cuda.device_count()
        raise UsageError(
            f"{setting} has '{name}', which torch does not find here; it finds the CPU and {count} of CUDA."
        ) from None
    return device
