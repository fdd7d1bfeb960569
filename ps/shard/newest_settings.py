"""The optimizer's settings in the newest rounds, for workers that have computed nothing in them."""

from __future__ import annotations

from typing import Any

import msgspec

from roundtable.common.protocol.messages.gradients import UsedSettings

#: The settings of so many rounds are remembered. A worker may ask for weights of an earlier version than the newest.
_ROUNDS = 4


class NewestSettings:
    """The settings of the newest rounds on server 0, of those that have not the settings of `Setup`."""

    def __init__(self) -> None:
        self._of: dict[int, UsedSettings] = {}

    def remember(self, settings: UsedSettings | None) -> None:
        """Remember the settings of a round that is applied."""
        if settings is not None:
            self._of[settings.round] = settings
            self._of.pop(settings.round - _ROUNDS, None)

    def before(self, round_: int) -> UsedSettings | None:
        """Return the settings of the round before `round_`."""
        return self._of.get(round_ - 1)

    def of_checkpoint(self, round_: int) -> dict[str, Any]:
        """Return what a checkpoint of `round_` must have."""
        settings = self.before(round_)
        return {} if settings is None else {"settings": msgspec.to_builtins(settings)}

    def resume(self, kept: dict[str, Any]) -> None:
        """Take over what `of_checkpoint` gave."""
        if "settings" in kept:
            self.remember(msgspec.convert(kept["settings"], UsedSettings))
