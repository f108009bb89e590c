"""The second script of the headline ratios, run as its user runs it, on small sizes."""

import re
import sys

import pytest

from bench import independent

SMALL = {"ROUNDS": 2, "SECONDS": 0.0, "M": 96, "K": 20, "D": 16, "A": 80, "WIDTH": 8, "CLASSES": 7}
LINE = re.compile(r"(\w+) +(\w+) +([\d.]+) ms +([\d.]+) x ours +(\d+)% of torch.mm's speed  error (\S+)")


@pytest.fixture
def run(monkeypatch, capsys):
    for name, value in SMALL.items():
        monkeypatch.setattr(independent, name, value)
    monkeypatch.setattr(sys, "argv", ["independent"])

    def finished():
        return independent.main(), *capsys.readouterr()

    return finished


def test_every_form_has_its_time_and_its_error(run):
    status, out, err = run()
    assert (status, err) == (0, "")
    header, *lines = out.splitlines()
    assert re.fullmatch(r"\d+ threads, torch .*, .*/hypercontrast/__init__.py", header)
    found = [LINE.fullmatch(line).groups() for line in lines]
    forms = {name: ["ours", *(form.__name__ for form in peers)] for name, (_, peers) in independent.CASES.items()}
    assert [(loss, form) for loss, form, *_ in found] == [(loss, form) for loss in forms for form in forms[loss]]
    assert set(forms) == {"ntce", "nonl", "normface", "supcon"}
    for _, form, ms, ratio, share, error in found:
        assert float(ms) > 0
        assert float(ratio) == 1 if form == "ours" else float(ratio) > 0
        assert int(share) > 0
        assert 0 < float(error) < independent.BOUND


@pytest.mark.parametrize("factor", [1 + 1e-5, float("nan")])
def test_a_result_past_the_bound_ends_the_run_with_an_error(factor, run, monkeypatch):
    right, eager = independent.CASES["nonl"]
    monkeypatch.setitem(independent.CASES, "nonl", (lambda *x, **options: factor * right(*x, **options), eager))
    status, out, err = run()
    assert status == 1
    assert err == "error: an error of ours is past 1.3e-06\n"
    assert len(out.splitlines()) == 10  # all forms are measured all the same


def test_an_argument_is_refused(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["independent", "--quick"])
    with pytest.raises(SystemExit, match="2"):
        run()
    said = capsys.readouterr()
    assert said.out == ""
    assert "unrecognized arguments: --quick" in said.err
