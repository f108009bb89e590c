"""What the site needs beyond mkdocs: the repository's own documents as pages, and formulas without a script.

Documents such as REPRODUCE.md stay where they are and are read from there, with the pictures beside them, at the same
path on the site: links among them and from docs/ are then right in both places. A link to a file that is no page (a
source file) becomes its path, for the site does not know where the repository is published; one to a file that does not
exist stays, and fails the build.

A fence of the language `formula` is plain text in the notation of the docstrings, readable as it is; here _ and ^
become sub- and superscripts. So do symbols with a subscript in running text and docstrings: n_c, s_{y_i i}.
"""

from __future__ import annotations

import posixpath
import re
from html import escape
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["REPRODUCE.md", "RELIABILITY.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"]
RECORDS = ["bench/results/**/README.md", "bench/results/*.md", "bench/results/*/*.png", "bench/results/*/*.svg"]
LINK = re.compile(r"(!?)\[([^\]]+)\]\((?!\w+:)([^)#\s]+)((?:#[^)\s]*)?)\)")
PIECE = re.compile(r"([_^])(?:\{((?:[^{}]|\{[^{}]*\})*)\}|(\w+))|([^\W\d_]+\u0302?)|(.)", re.DOTALL)
UPRIGHT = "ΣΔ"
SYMBOL = re.compile(r"(?<!\w)(?:mean|[^\W\d_]\u0302?)_(?:\{(?:[^{}]|\{[^{}]*\})*\}|[^\W_]{1,2})(?!\w)")
NO_TEXT = re.compile(r"(<pre.*?</pre>|<code.*?</code>|<[^>]+>)", re.DOTALL)


def on_config(config):
    fence = {"name": "formula", "class": "formula", "format": formula}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config


def on_files(files, config):
    found = [ROOT / name for name in DOCUMENTS] + sorted({path for glob in RECORDS for path in ROOT.glob(glob)})
    for path in found:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    written = "docs/" + page.file.src_path if page.file.generated_by is None else page.file.src_path

    def on_site(link: re.Match) -> str:
        picture, text, target, anchor = link.groups()
        place = posixpath.normpath(posixpath.join(posixpath.dirname(written), target))
        served = place.removeprefix("docs/")
        if not picture and files.get_file_from_path(served) is None and (ROOT / place).exists():
            return text if text.startswith("`") else f"{text} (`{place}`)"
        return f"{picture}[{text}]({posixpath.relpath(served, posixpath.dirname(page.file.src_path))}{anchor})"

    return LINK.sub(on_site, markdown)


def on_page_content(html, page, config, files):
    pieces = NO_TEXT.split(html)  # text at even places
    pieces[::2] = [SYMBOL.sub(lambda symbol: typeset(symbol[0]), text) for text in pieces[::2]]
    return "".join(pieces).replace("::</p>", ":</p>")  # what opens a block of code in docstrings


def formula(source, language, css_class, options, md, **kwargs) -> str:
    lines = "<br>".join(re.sub("  +", "&emsp;", typeset(line)) for line in source.splitlines())
    return f'<p class="{css_class}">{lines}</p>'


def typeset(text: str, longest: int = 1) -> str:
    """`s_{y_i i}` and `e^{-x}` as HTML: words of at most `longest` letters are variables, which are slanted."""
    out = []
    for mark, braced, bare, word, other in PIECE.findall(text):
        if mark:
            tag = "sub" if mark == "_" else "sup"
            out.append(f"<{tag}>{typeset(braced or bare, longest=2)}</{tag}>")
        elif word:
            slanted = len(word.removesuffix("\u0302")) <= longest and word not in UPRIGHT
            out.append(f"<i>{word}</i>" if slanted else word)
        else:
            out.append(escape(other, quote=False))
    return "".join(out)
