"""What the README and the pages of docs/ show works as written: snippets, commands, links, pictures, the site itself.

Snippets run in the order of their page, in one namespace; one that opens with a comment such as `# my_losses.py` is that
file, which later ones import.
"""

import argparse
import csv
import importlib
import importlib.util
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import hypercontrast as hc
from hypercontrast import cli, config, progress
from hypercontrast.metrics import DESCRIPTIONS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS = [*PAGES, *sorted(set(ROOT.glob("*.md")) - set(PAGES))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")

# What the README's "before" takes from the reader's own code.
GIVEN = {
    "README.md": {
        "F": F,
        "features": torch.randn(8, 4),
        "prototypes": torch.randn(3, 4),
        "labels": torch.randint(0, 3, (8,)),
    }
}
NOT_RUN: dict[tuple[str, int], str] = {}  # (page, place of the snippet): the reason why it is shown and not run
PEERS = ("lightly", "pytorch_metric_learning")  # what a snippet compares with, and the tests do without
STANDS_FOR = {
    "RUN": "runs/one",
    "OP": "ntce",
    "LOSS": "nonl",
    "MODULE:LOSS": "mine:Loss",
}  # words that stand for the reader's own


def blocks(page, language):
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


def named(page):
    return str(page.relative_to(ROOT))


def command_lines(start):
    """(page, command) of every line of a bash block that begins so, without its comment."""
    for page in DOCUMENTS:
        for text in blocks(page, "bash"):
            for line in text.splitlines():
                if line.startswith(start):
                    yield pytest.param(line.partition("#")[0].strip(), id=f"{named(page)}: {line}")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=named)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {"__name__": "__main__", **GIVEN.get(named(page), {})}
    absent = []
    for place, text in enumerate(blocks(page, "python")):
        file = re.match(r"# (\w+)\.py\n", text)
        if file:
            (tmp_path / f"{file[1]}.py").write_text(text)
            monkeypatch.delitem(sys.modules, file[1], raising=False)
        elif (named(page), place) not in NOT_RUN:
            try:
                exec(compile(text, f"{named(page)}, snippet {place}", "exec"), names)
            except ModuleNotFoundError as error:
                if error.name not in PEERS:
                    raise
                absent.append(f"snippet {place} needs {error.name}")
    if absent:
        pytest.skip("; ".join(absent))


class Parsed(Exception):
    """The command line was understood."""


def test_the_page_of_the_command_names_them_all():
    page = (ROOT / "docs" / "command.md").read_text()
    assert re.findall(r"^\| `(\w[\w-]*)` \|", page, flags=re.MULTILINE) == [*cli.COMMANDS]
    codes = [line.split()[0] for line in cli.EXIT_CODES.splitlines()]
    assert re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE) == codes


@pytest.mark.parametrize("line", [*command_lines("python -m "), *command_lines("hypercontrast ")])
def test_commands_parse(line, monkeypatch):
    words = [STANDS_FOR.get(word, word) for word in shlex.split(line.partition(">")[0])]
    if words[0] == "hypercontrast":
        module, words = f"hypercontrast.{cli.COMMANDS[words[1]][0]}", words[2:]
    else:
        module, words = words[2], words[3:]

    def stopping(understand):
        def parse_args(self, given=None, namespace=None):
            understand(self, given, namespace)
            raise Parsed

        return parse_args

    for kind in (argparse.ArgumentParser, progress.Parser):
        monkeypatch.setattr(kind, "parse_args", stopping(kind.parse_args))
    if "--help" in words:
        assert words == ["--help"]
    elif module == "hypercontrast.train":
        config.parse(words)
    elif module not in ("pytest", "http.server"):
        main = importlib.import_module(f"{module}.__main__" if module == "bench" else module).main
        with pytest.raises(Parsed):
            main(words)


def test_every_module_has_its_place_in_contributing():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    modules = [path for folder in ("", "data") for path in (ROOT / "hypercontrast" / folder).glob("*.py")]
    assert [path.name for path in modules if f"{path.name}`" not in page and not path.name.startswith("__")] == []


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    lines = [parameter.values[0] for parameter in command_lines("make ")]
    named_targets = {word for line in lines for word in line.split()[1:] if "=" not in word}
    assert "demo" in named_targets
    assert named_targets <= targets


def test_install_says_how_to_build_the_extension():
    """`pip install .` builds apart from torch and leaves it out; doctor names the same command."""
    for page in (ROOT / "README.md", ROOT / "docs" / "index.md"):
        assert "pip install --no-build-isolation --no-deps ." in "".join(blocks(page, "bash"))


SUPCON_TIMES = {  # of 8,192 x 128, a record a column: (record, the form's name there)
    "N x N, as its published code computes it": (("cpu-3/compiled", "published N x N"), ("cpu/matrix", "dense N x N")),
    "`hc.supcon_loss`": (("cpu-3/compiled", "ours"), ("cpu/matrix", "ours")),
}


@pytest.mark.parametrize("row", SUPCON_TIMES)
def test_times_of_supcon_are_its_records(row):
    (line,) = re.findall(rf"^\| {re.escape(row)} \|(.*)\|$", (ROOT / "docs" / "supcon.md").read_text(), re.MULTILINE)
    for cell, (record, form) in zip(line.split("|"), SUPCON_TIMES[row], strict=False):
        rows = csv.DictReader((ROOT / "bench" / "results" / f"2026-11-28-{record}.csv").open())
        (time,) = [float(x["fwd_bwd_ms"]) for x in rows if (x["op"], x["form"], x["n"]) == ("supcon", form, "8192")]
        assert float(cell.replace(",", "")) == pytest.approx(time, rel=0.01)


def anchors(page):
    """Of a page's headings, as GitHub and mkdocs form them."""
    text = FENCE.sub("", page.read_text())
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading)).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", DOCUMENTS, ids=named)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(FENCE.sub("", page.read_text())):
        leads_to = page if not target else page.parent / target
        assert leads_to.exists(), target
        assert not anchor or anchor in anchors(leads_to), f"{target}#{anchor}"


def test_losses_take_the_options_that_the_page_says_they_share():
    _, _, section = (ROOT / "docs" / "losses.md").read_text().partition("## Options they share\n")
    of_all, of_prototypes = (
        set(re.findall(r"`(\w+)[=`]", text)) - {"queue"}
        for text in section.partition("```")[0].split("Losses with prototypes")
    )
    assert of_all
    assert of_all <= set(inspect.signature(hc.supcon_loss).parameters)
    for loss in (hc.normface_loss, hc.ntce_loss, hc.nonl_loss):
        assert of_all | of_prototypes <= set(inspect.signature(loss).parameters)


def test_every_metric_is_explained():
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert [key for key in DESCRIPTIONS if f"`{key}`" not in page] == []


def test_pictures_are_what_the_script_draws():
    drawn = runpy.run_path(str(ROOT / "docs" / "draw.py"))["pictures"]()
    kept = {path.name: path.read_text() for path in (ROOT / "docs" / "pictures").iterdir()}
    assert kept == drawn
    pages = "".join(page.read_text() for page in PAGES)
    assert [name for name in drawn if f"pictures/{name}" not in pages] == []


def test_every_name_of_the_api_is_the_package_s_own():
    page = (ROOT / "docs" / "api.md").read_text()
    assert "Every public name is `hypercontrast.NAME`" in page
    modules = {path.stem for path in (ROOT / "hypercontrast").glob("*.py")}
    assert set(re.findall(r"^::: hypercontrast\.(\S+)", page, flags=re.MULTILINE)) <= {*hc.__all__, *modules}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site: strictly, so that a link or an anchor that leads nowhere is an error."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'hypercontrast[docs]'")
    folder = tmp_path_factory.mktemp("site")
    # Not with --quiet, under which nothing is counted as a warning.
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_site_asks_nobody_else(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        fetched = re.findall(
            r'<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)="?((?:https?:)?//[^"\s>]+)', page.read_text()
        )
        assert fetched == [], page


def test_site_documents_every_public_name(site):
    ids = set(re.findall(r'id="hypercontrast\.[\w.]*?(\w+)"', (site / "api.html").read_text()))
    assert set(hc.__all__) <= ids


def test_site_sets_formulas(site):
    page = (site / "losses.html").read_text()
    assert '<p class="formula"><i>L</i> = mean<sub><i>j</i></sub> [ log Σ<sub><i>c</i></sub> exp(' in page
    assert "<i>s</i><sub><i>y</i><sub><i>i</i></sub> <i>j</i></sub>" in page
    assert "language-formula" not in page
