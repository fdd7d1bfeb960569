"""Shows a run to the user: live on a terminal, elsewhere in plain lines, with the script's output."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live

from roundtable.cluster.run.display import line, picture
from roundtable.cluster.run.progress import Mode, Progress, Tracker
from roundtable.cluster.run.script_output import ScriptOutput
from roundtable.common.runtime.errors import printable
from roundtable.common.storage.disk_alarm import Alarm

#: Seconds between two looks at the event log.
_LIVE_S = 0.5
#: Seconds between two plain lines in the first `_FIRST_S` seconds.
_PLAIN_S = 5.0
#: Seconds between two plain lines after that.
_LATER_S = 30.0
_FIRST_S = 60.0


class Screen:
    """Shows a run's progress. A context: at its end the terminal is as before. Call `update` often."""

    def __init__(
        self,
        console: Console,
        log: Path,
        clock: Callable[[], float] = time.monotonic,
        mode: Mode = "auto",
        quiet: bool = False,
        output: ScriptOutput | None = None,
    ) -> None:
        """Show the run whose event log is `log`, which need not exist yet. `quiet`: print only warnings and `report` lines."""
        self._console = console
        self._tracker = Tracker(log)
        self._clock = clock
        self._quiet = quiet
        self._output = output
        self._live: Live | None = None
        self._is_shown = mode != "off" and not quiet
        if self._is_shown and (mode == "live" or (mode == "auto" and console.is_terminal and not console.is_dumb_terminal)):
            self._live = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False, transient=True)
        self._looked_at = float("-inf")
        self._began_at = self._reported_at = clock()
        self.progress = Progress()
        #: The coordinator's report that it cannot write to the event log.
        self.alarm = Alarm()

    def __enter__(self) -> Screen:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live and error is None:  # the last rounds may have come since the last look
            self._looked_at = float("-inf")
            self.update()
        self._pass_on(at_end=True)
        if self._live:
            self._live.stop()
        self.alarm.close()

    def say(self, text: str) -> None:
        """Print a line of news, above the live part if there is one."""
        if not self._quiet or text.startswith("warning: "):
            say(self._console, text)

    def report(self, text: str) -> None:
        """Print a line of results, even with `quiet`."""
        say(self._console, text)

    def update(self, has_log: bool = True) -> None:
        """Look at the run and show it, if the last look is long enough ago.

        Give `has_log` False while the event log is still that of an earlier part of the run.
        """
        now = self._clock()
        if now < self._looked_at + _LIVE_S:
            return
        self._looked_at = now
        self._pass_on()
        if has_log:
            self._look()
        elapsed_s = now - self._began_at
        if self._live:
            self._live.update(picture(self.progress, elapsed_s, self._console.height), refresh=True)
        elif self._is_shown and now >= self._reported_at + (_PLAIN_S if elapsed_s <= _FIRST_S else _LATER_S):
            self._reported_at = now
            self.say(line(self.progress, elapsed_s))

    def _look(self) -> None:
        before, self.progress = self.progress.alarm, replace(self._tracker.look(), alarm=self.alarm.text)
        for news in self.progress.news:
            self.say(news)
        if self.progress.alarm and not before:
            self.say(f"warning: {self.progress.alarm}")

    def _pass_on(self, at_end: bool = False) -> None:
        if self._output is not None and not self._quiet:
            for text in self._output.lines(at_end):
                self.say(text)


class LiveOnly(Screen):
    """A screen for a run that is only a means to something else: progress on a terminal, and no lines."""

    def say(self, text: str) -> None:
        pass

    def report(self, text: str) -> None:
        pass


def say(console: Console, text: str) -> None:
    """Print a line. Replace characters that a terminal would obey."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
