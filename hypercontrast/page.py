"""What a page is made of: its style, and its parts as HTML. It loads nothing and runs nothing.

Arguments called `text`, `title`, `caption`, `label` and `alt` are plain text, escaped here; the others are HTML.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from hypercontrast import figures
from hypercontrast.figures import COSINE_COLOURS, Array

TEAL, BROWN = (" ".join(map(str, COSINE_COLOURS[sign])) for sign in (1, -1))

STYLE = f"""
* {{ box-sizing: border-box; }}
html {{ scroll-behavior: smooth; }}
@media (prefers-reduced-motion) {{ html {{ scroll-behavior: auto; }} }}
body {{ margin: 0; background: var(--paper); color: var(--ink); font-variant-numeric: tabular-nums;
  font: 17px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; -webkit-text-size-adjust: 100%; }}
header, main {{ max-width: 1080px; margin: 0 auto; padding: 0 20px; overflow-wrap: anywhere; }}
header {{ padding-top: 48px; }}
main {{ padding-bottom: 80px; }}
section {{ margin-top: 72px; }}
section:first-child {{ margin-top: 20px; }}
p {{ max-width: 68ch; margin: .6em 0; }}
h1 {{ font-size: clamp(1.7rem, 5vw, 2.4rem); line-height: 1.15; letter-spacing: -.02em; margin: 0; }}
h2 {{ font-size: 1.45rem; line-height: 1.25; margin: 0 0 .5em; letter-spacing: -.01em; }}
h3 {{ font-size: 1rem; margin: 0 0 .3em; }}
h3.row {{ font-size: 1.1rem; margin-top: 1.8em; }}
.soft, figcaption, small, .scale, .cards dt {{ color: var(--soft); font-size: .86rem; line-height: 1.5; }}
.lead {{ font-size: clamp(1.1rem, 2.4vw, 1.35rem); line-height: 1.45; max-width: 60ch; margin: 0 0 .8em; }}
.quiet, .skip:not(:focus) {{ position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }}
nav ul {{ display: flex; flex-wrap: wrap; gap: 2px 18px; padding: 0; margin: 18px 0 0; list-style: none;
  font-size: .92rem; }}
nav a {{ display: inline-block; padding: 4px 0; }}
a {{ color: var(--run1); text-underline-offset: 3px; }}
.cards {{ display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); margin: 24px 0; }}
.cards > div {{ display: flex; flex-direction: column; padding: 12px 14px; border: 1px solid var(--rule);
  border-radius: 8px; background: var(--card); }}
.cards dd {{ margin: 0; }}
.cards dd:first-of-type {{ font-size: 1.6rem; line-height: 1.3; font-weight: 650; letter-spacing: -.01em; }}
.cards dt {{ margin-bottom: auto; line-height: 1.35; }}
.grid {{ display: grid; gap: 28px; margin-top: 20px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }}
.grid.wide {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); }}
figure {{ margin: 0; min-width: 0; max-width: 520px; }}
figcaption {{ margin-top: .3em; }}
.legend {{ display: flex; flex-wrap: wrap; gap: 4px 22px; padding: 0; margin: 1em 0 0; list-style: none; }}
.legend li {{ display: flex; align-items: center; gap: 8px; }}
svg.key {{ width: 40px; height: 12px; flex: none; }}
.scale {{ display: flex; align-items: center; gap: 8px; max-width: 420px; margin: 1em 0; }}
.scale i {{ flex: 1; height: 12px; background: linear-gradient(to right, rgb({BROWN}), rgb({BROWN} / 0)); }}
.scale i + span + i {{ background: linear-gradient(to right, rgb({TEAL} / 0), rgb({TEAL})); }}
.strip {{ display: flex; gap: 8px; padding: 0; margin: 4px 0 14px; list-style: none; }}
.strip li {{ flex: 0 1 72px; min-width: 0; overflow-wrap: anywhere; font-size: .8rem; line-height: 1.3; }}
.strip img {{ display: block; width: 100%; height: auto; image-rendering: pixelated;
  border-radius: 4px; background: #000; margin-bottom: 3px; }}
.scroll {{ overflow-x: auto; margin: 1em 0; overflow-wrap: normal; }}
table {{ border-collapse: collapse; font-size: .95rem; line-height: 1.4; }}
th, td {{ text-align: left; vertical-align: top; padding: .55em 1.4em .55em 0; border-bottom: 1px solid var(--rule); }}
thead th {{ font-weight: 500; color: var(--soft); font-size: .86rem; vertical-align: bottom; }}
tbody th {{ font-weight: 600; }}
td {{ white-space: nowrap; }}
td.best {{ font-weight: 700; }}
td.best small {{ display: inline; margin-left: .5em; font-weight: 500; }}
small {{ display: block; font-weight: 400; }}
tbody th {{ min-width: 11ch; }}
tbody th small {{ min-width: 22ch; max-width: 62ch; }}
thead th {{ max-width: 17ch; }}
td small {{ white-space: normal; max-width: 17ch; }}
code {{ font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-weight: 400; }}
th code {{ color: var(--soft); }}
pre {{ white-space: pre-wrap; padding: 14px 16px; border: 1px solid var(--rule); border-radius: 6px;
  background: var(--card); }}
details {{ margin-top: 1.2em; }}
summary {{ cursor: pointer; padding: .4em 0; }}
:focus-visible {{ outline: 2px solid var(--run1); outline-offset: 3px; }}
@media print {{
  body {{ font-size: 11pt; print-color-adjust: exact; }}
  nav, .skip {{ display: none; }}
  section {{ margin-top: 32px; }}
  h2, h3 {{ break-after: avoid; }}
  figure, tr, pre, .cards > div {{ break-inside: avoid; }}
  .scroll {{ overflow: visible; }}
  details::details-content {{ content-visibility: visible; block-size: auto; }}
}}
"""


def document(title: str, below: str, sections: Iterable[tuple[str, str, str]]) -> str:
    """A whole page. Its policy forbids scripts and any request, whatever its words contain.

    below: what stands under the title. sections: (id, title, content); those without content are left out.
    """
    kept = [section for section in sections if section[2]]
    links = "".join(f'<li><a href="#{name}">{escape(words)}</a></li>' for name, words, _ in kept[1:])
    body = "".join(_section(*section, quiet=section is kept[0]) for section in kept)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} – hypercontrast</title>
<style>{figures.SCHEME}{STYLE}{figures.STYLE}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the outcome</a>
<header><h1>{escape(title)}</h1>{below}
<nav aria-label="On this page"><ul>{links}</ul></nav></header>
<main id="main">{body}</main>
</body>
</html>
"""


def _section(name: str, title: str, content: str, *, quiet: bool) -> str:
    """quiet: its heading is for those who hear the page; others see that it is the first."""
    css = ' class="quiet"' if quiet else ""
    return f'\n<section aria-labelledby="{name}"><h2 id="{name}"{css}>{escape(title)}</h2>{content}</section>'


def figure(title: str, drawing: str, caption: str) -> str:
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure><h3>{escape(title)}</h3>{drawing}{below}</figure>"


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], label: str, best: Iterable[tuple[int, int]] = ()
) -> str:
    """A table in a region that scrolls by itself and can be reached by keyboard.

    best: (row, column) of the cells that lead, marked by weight and by word.
    """
    leading = set(best)
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = ""
    for r, (first, *cells) in enumerate(rows):
        shown = "".join(
            f'<td class="best">{cell}<small>best</small></td>' if (r, c) in leading else f"<td>{cell}</td>"
            for c, cell in enumerate(cells, start=1)
        )
        body += f'<tr><th scope="row">{first}</th>{shown}</tr>'
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def cards(entries: Iterable[tuple[str, str, str]]) -> str:
    """(name, value, remark) of the numbers that matter most."""
    return (
        '<dl class="cards">'
        + "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd><small>{escape(remark)}</small></dd></div>"
            for name, value, remark in entries
        )
        + "</dl>"
    )


def folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>" if content else ""


def command(text: str) -> str:
    return f"<pre><code>{escape(text)}</code></pre>"


def picture(pixels_CHW: Array, alt: str) -> str:
    """A small picture of uint8, grey or in colour."""
    height, width = pixels_CHW.shape[1:]
    data = figures.png(pixels_CHW.transpose(1, 2, 0))
    return f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{escape(alt)}">'
