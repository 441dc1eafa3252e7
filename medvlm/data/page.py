"""Pages and figures on disk: HTML that needs nothing from elsewhere, in light and dark, or PNG."""

import html
import importlib
import io
from pathlib import Path
from typing import Any

from medvlm.errors import UserError

FORMATS = (".html", ".png")
INK = "#808081"  # of a figure's text and axes; HTML replaces it by the page's colour
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --faint: #66666e; --paper: #ffffff; --line: #d9d9df;
  --mark: #b7f0cf; --mark-ink: #06402b; --im: #d6d6ff; --im-ink: #2b2b60; --bad: #ffdada; --bad-ink: #8b0000;
  --yes: #ffd9c7; --yes-ink: #7a1f00; --maybe: #fff0b3; --maybe-ink: #5a4b00; --no: #e8e8ec; --edge: #0000001f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ec; --faint: #a0a0aa; --paper: #17171b; --line: #3a3a42;
  --mark: #0f5132; --mark-ink: #d1f7e0; --im: #34346e; --im-ink: #dcdcff; --bad: #5c1a1a; --bad-ink: #ffdada;
  --yes: #6b2a10; --yes-ink: #ffe3d6; --maybe: #5a4b00; --maybe-ink: #fff0b3; --no: #34343c; --edge: #ffffff2e; } }
body { margin: 1.5rem auto; padding: 0 1rem; max-width: 1400px; background: var(--paper); color: var(--ink);
  font: 14px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }
small, figcaption, .facts, dt { color: var(--faint); font-size: .85rem; font-weight: normal; }
article { border-top: 1px solid var(--line); padding: 1rem 0; }
.row { display: flex; gap: 1.2rem; flex-wrap: wrap; }
.pictures { display: flex; flex-wrap: wrap; gap: .6rem; max-width: 100%; }
.text { flex: 1 1 26rem; min-width: 0; } figure { margin: 0; max-width: 100%; } figcaption { max-width: 24rem; }
figure svg { display: block; max-width: 100%; overflow: hidden; background: #000; image-rendering: pixelated; }
figure polygon { fill: none; }
figure text { font-family: system-ui, sans-serif; paint-order: stroke;
  stroke: #000a; stroke-width: .2em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 12.5px/1.65 ui-monospace, "DejaVu Sans Mono", monospace;
  margin: 0 0 .6rem; }
pre, dl.turns { max-height: 32rem; overflow-y: auto; }
pre i, pre mark, .legend i, .legend mark { font-style: normal; background: none; color: inherit; border-radius: 2px;
  box-shadow: inset -1px 0 var(--edge); }
pre mark, .legend mark { background: var(--mark); color: var(--mark-ink); }
i.im, .legend i.im { background: var(--im); color: var(--im-ink); padding: 0 .3em; }
.label { border-radius: 3px; padding: 0 .4em; background: var(--no); display: inline-block; margin: 0 .2em .2em 0; }
.label.positive { background: var(--yes); color: var(--yes-ink); }
.label.uncertain { background: var(--maybe); color: var(--maybe-ink); }
.reason { background: var(--bad); color: var(--bad-ink); padding: .2em .6em; border-radius: 3px; }
.facts span { margin-right: .8em; } .facts { overflow-wrap: anywhere; }
dl.turns { margin: 0 0 .6rem; display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; }
dl.turns dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.plot svg { width: 100%; height: auto; color: var(--ink); }
"""


def require(name: str) -> Any:
    """An optional library, or a UserError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"pictures need {name}: pip install 'medvlm[eval]'") from None


def output_format(out: Path) -> str:
    """ "html" or "png", by the file's ending."""
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"{out}: the ending must be one of {', '.join(FORMATS)}")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder")
    return out.suffix.lower()[1:]


def html_page(title: str, body: str) -> str:
    """A page that needs nothing from elsewhere. ``body`` is markup, ``title`` is text."""
    title = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n<meta name="viewport" '
        f'content="width=device-width"><style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n{body}\n</body></html>\n'
    )


def figure_svg(figure: Any) -> str:
    """A figure as SVG markup in the colours of the page around it; equal figures give equal text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "medvlm"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    markup = buffer.getvalue()
    return markup[markup.index("<svg") :].replace(INK, "currentColor")


def write_figure(figure: Any, out: Path, title: str) -> Path:
    """Write a figure of this module to ``out``, .png or .html."""
    if output_format(out) == "png":
        figure.savefig(out, dpi=110, facecolor="white")
    else:
        out.write_text(html_page(title, f'<div class="plot">{figure_svg(figure)}</div>'), encoding="utf-8")
    return out


def inked(axes: Any) -> Any:
    """Axes whose lines and words take the page's colour."""
    axes.tick_params(colors=INK, which="both")
    for spine in axes.spines.values():
        spine.set_color(INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for words in (axes.title, axes.xaxis.label, axes.yaxis.label):
        words.set_color(INK)
    return axes
