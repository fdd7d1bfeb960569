"""Show images beside the nearest ones, as a picture and as a page without further files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from roundtable.common.runtime.errors import UsageError
from roundtable.explore.pictures import Asked, data_uri, figure, label_text, save, to_pixels
from roundtable.worker.data import Images

_SAME, _OTHER, _QUERY = "#2e8b57", "#d0342c", "#404040"


@dataclass(frozen=True)
class Match:
    """A training image that was found: its number, its label and its distance."""

    number: int
    label: int
    distance: float


@dataclass(frozen=True)
class Row:
    """A query, and the images nearest to it, the nearest first."""

    query: Asked
    matches: Sequence[Match]

    def colour(self, match: Match) -> str:
        """Return the colour of a match's frame, which says whether it has the query's label, if that is known."""
        return _QUERY if self.query.label is None else _SAME if match.label == self.query.label else _OTHER


@dataclass(frozen=True)
class Gallery:
    """The contents. `cells` is a table for the page, its head first. `note` explains the table. Both may be empty."""

    title: str
    images: Images
    rows: Sequence[Row]
    cells: Sequence[tuple[str, ...]]
    note: str

    def caption(self, query: Asked, between: str = ": ") -> str:
        """Return what is known of a query."""
        return query.name + (f"{between}{label_text(query.label, self.images)}" if query.label is not None else "")

    def legend(self) -> str:
        known = any(row.query.label is not None for row in self.rows)
        colours = "Green frames have the query's label, red ones another. " if known else ""
        return f"{colours}Under each image: its label, its number among the training images, and its distance."


def draw(gallery: Gallery, path: Path) -> Path:
    """Write the gallery as a PNG: a row for each query, and the query first."""
    columns = 1 + max(len(row.matches) for row in gallery.rows)
    made = figure(max(1.25 * columns, 8), 1.65 * len(gallery.rows) + 1.0)
    grid = made.subplots(len(gallery.rows), columns, squeeze=False)
    for row, axes in zip(gallery.rows, grid, strict=True):
        shown = [(row.query.image, gallery.images.test, gallery.caption(row.query, "\n"), _QUERY)]
        for match in row.matches:
            text = f"{label_text(match.label, gallery.images)}\n#{match.number}   {match.distance:.3f}"
            shown.append((gallery.images.train[match.number][0], gallery.images.train, text, row.colour(match)))
        for one in axes:
            one.set_axis_off()
        for one, (image, samples, text, colour) in zip(axes, shown, strict=False):
            one.set_axis_on()
            one.imshow(to_pixels(image, samples), interpolation="nearest")
            one.set(xticks=[], yticks=[])
            one.set_xlabel(text, fontsize=8)
            for spine in one.spines.values():
                spine.set(color=colour, linewidth=2.5)
        axes[0].set_title("query", fontsize=8, fontweight="bold")
    made.suptitle(gallery.title, fontsize=10)
    made.supxlabel(gallery.legend(), fontsize=8)
    return save(made, path)


def write_page(gallery: Gallery, path: Path) -> Path:
    """Write the gallery as one HTML file with all images inside. Raise UsageError if that fails."""
    body = [f"<h1>{escape(gallery.title)}</h1>", f"<p>{escape(gallery.legend())}</p>"]
    for row in gallery.rows:
        caption = gallery.caption(row.query)
        shown = [_figure(data_uri(to_pixels(row.query.image, gallery.images.test)), caption, _QUERY)]
        for match in row.matches:
            label = label_text(match.label, gallery.images)
            text = f"{label}, #{match.number}, {match.distance:.4f}"
            uri = data_uri(to_pixels(gallery.images.train[match.number][0], gallery.images.train))
            shown.append(_figure(uri, text, row.colour(match)))
        note = f"<p>{escape(row.query.note)}.</p>" if row.query.note else ""
        body.append(f"<section><h2>{escape(caption)}</h2>{note}<div class=row>{''.join(shown)}</div></section>")
    if gallery.cells:
        lines = [_line(line, "td") for line in gallery.cells[1:]]
        body.append(
            f"<h2>Retrieval</h2><table>{_line(gallery.cells[0], 'th')}{''.join(lines)}</table><p>{escape(gallery.note)}</p>"
        )
    text = _PAGE.format(title=escape(gallery.title), body="\n".join(body))
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from None
    return path


def _figure(uri: str, text: str, colour: str) -> str:
    alt = escape(text, quote=True)
    return f'<figure><img src="{uri}" alt="{alt}" style="border-color:{colour}"><figcaption>{alt}</figcaption></figure>'


def _line(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #222; }}
h1 {{ font-size: 1.3em; }} h2 {{ font-size: 1em; margin: 1.2em 0 .3em; }}
.row {{ display: flex; flex-wrap: wrap; gap: .7em; }}
figure {{ margin: 0; width: 104px; }} figure:first-child {{ margin-right: 1em; }}
img {{ width: 96px; height: 96px; object-fit: contain; border: 4px solid; image-rendering: pixelated; }}
figcaption {{ font-size: .8em; text-align: center; overflow-wrap: anywhere; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2em .8em; border-bottom: 1px solid #ccc; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }}
</style>
{body}
</html>
"""
