"""Record a real run in a terminal as an animated SVG: `python docs/record.py docs/run.svg`.

The run is the built-in example with three workers, one of which is killed on the way.
"""

from __future__ import annotations

import argparse
import io
import os
import pty
import re
import select
import signal
import sqlite3
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

COLUMNS, ROWS = 100, 14
#: Seconds between two frames, at least; that all of them take when they are played, at most; and for which the last one stays.
FRAME_S, PLAYED_S, LAST_S = 0.5, 15.0, 5.0
#: Width and height of a character, as rich draws them; and the margin around all.
CHAR, LINE, MARGIN = 12.2, 24.4, 16

EPOCHS = 3
COMMAND = f"python launch.py local --workers 3 --epochs {EPOCHS}"
_CONTROL = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|\r|\n")
_FRAME = '<g class="{unique_id}"><defs>{lines}</defs><style>{styles}</style>{backgrounds}{matrix}</g>'


class Terminal:
    """The lines that a terminal shows, as far as rich needs one: it erases whole lines and writes them again."""

    def __init__(self) -> None:
        self.lines = [""]
        self._row = 0

    def feed(self, text: str) -> None:
        at = 0
        for control in _CONTROL.finditer(text):
            self.lines[self._row] += text[at : control.start()]
            at = control.end()
            self._obey(control)
        self.lines[self._row] += text[at:]

    def _obey(self, control: re.Match[str]) -> None:
        number, letter = control[1], control[2]
        if control[0] == "\n":
            self._row += 1
            if self._row == len(self.lines):
                self.lines.append("")
        elif letter == "A":
            self._row = max(0, self._row - int(number or 1))
        elif letter == "K":
            self.lines[self._row] = ""
        elif letter == "m":
            self.lines[self._row] += control[0]


def record(run_dir: Path, kill_after_s: float) -> list[tuple[float, list[str]]]:
    """Run the command and return what the terminal showed, with the seconds since the beginning."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(COLUMNS=str(COLUMNS), LINES=str(ROWS), TERM="xterm-256color", LC_ALL="C.UTF-8")
        flags = ["local", "--workers", "3", "--epochs", str(EPOCHS), "--run-dir", str(run_dir)]
        os.execv(sys.executable, [sys.executable, "launch.py", *flags])
    began, screen, frames, killed = time.monotonic(), Terminal(), [], False
    while True:
        now = time.monotonic() - began
        if not killed and now > kill_after_s:
            killed = kill(run_dir, "worker-1")
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                data = os.read(terminal, 65536)
            except OSError:
                break
            if not data:
                break
            screen.feed(data.decode(errors="replace"))
        if not frames or (now > frames[-1][0] + FRAME_S and frames[-1][1] != screen.lines):
            frames.append((now, list(screen.lines)))
    frames.append((time.monotonic() - began, list(screen.lines)))
    _, status = os.waitpid(pid, 0)
    if status:
        sys.exit(f"the run has failed:\n{chr(10).join(screen.lines)}")
    return frames


def kill(run_dir: Path, process: str) -> bool:
    """Kill a process of the run as soon as it trains. Whether it is done."""
    try:
        with closing(sqlite3.connect(f"file:{run_dir / 'events.sqlite'}?mode=ro", uri=True)) as log:
            rounds = log.execute("SELECT count(*) FROM rounds").fetchone()[0]
            found = log.execute(
                "SELECT json_extract(data, '$.pid') FROM events WHERE kind = 'joined' AND process = ?", [process]
            ).fetchone()
    except sqlite3.Error:
        return False
    if not rounds or found is None:
        return False
    os.kill(found[0], signal.SIGKILL)
    return True


def drawn(lines: list[str], name: str) -> str:
    """One frame, as a group of an SVG."""
    console = Console(width=COLUMNS, record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(f"$ {COMMAND}", style="bold"))
    for line in lines[-(ROWS - 1) :]:
        console.print(Text.from_ansi(line))
    return console.export_svg(code_format=_FRAME, unique_id=name, theme=MONOKAI)


def thinned(frames: list[tuple[float, list[str]]]) -> list[tuple[float, list[str]]]:
    """The frames without those that come too soon after another one. The last one stays."""
    kept = frames[:1]
    for frame in frames[1:-1]:
        if frame[0] >= kept[-1][0] + FRAME_S:
            kept.append(frame)
    return [*kept, frames[-1]]


def svg(frames: list[tuple[float, list[str]]]) -> str:
    """All frames, one after another, and again from the first. A run that takes long is played faster."""
    speed = max(1.0, frames[-1][0] / PLAYED_S)
    frames = thinned([(at / speed, lines) for at, lines in frames])
    total = frames[-1][0] + LAST_S
    width, height = COLUMNS * CHAR + 2 * MARGIN, ROWS * LINE + 2 * MARGIN
    groups, rules = [], []
    for number, (at, lines) in enumerate(frames):
        groups.append(drawn(lines, f"f{number}"))
        is_last = number == len(frames) - 1
        ends = "" if is_last else f" {100 * frames[number + 1][0] / total:.2f}% {{ visibility: hidden }}"
        starts = f"{100 * at / total:.2f}% {{ visibility: visible }}"
        rules.append(f"@keyframes k{number} {{ {'' if not number else '0% { visibility: hidden } '}{starts}{ends} }}")
        rules.append(f".f{number} {{ visibility: {'visible' if is_last else 'hidden'}; ")
        rules.append(f"animation: k{number} {total:.1f}s step-end infinite }}")
    font = 'font-family="Menlo, Consolas, DejaVu Sans Mono, monospace" font-size="20"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" {font}>\n'
        f"<style>{chr(10).join(rules)}</style>\n"
        f'<rect width="{width:.0f}" height="{height:.0f}" rx="8" fill="#1b1b1b"/>\n'
        f'<g transform="translate({MARGIN}, {MARGIN})">\n{chr(10).join(groups)}\n</g>\n</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kill-after", type=float, default=6.0, metavar="SECONDS", help="kill worker-1 then")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        frames = record(Path(folder) / "run", arguments.kill_after)
    hidden = re.compile(re.escape(folder) + r"/run")
    frames = [(at, [hidden.sub("runs/demo", line) for line in lines]) for at, lines in frames]
    arguments.out.write_text(svg(frames), encoding="utf-8")
    print(f"{arguments.out}: {len(frames)} frames of {frames[-1][0]:.0f} s, {arguments.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
