"""Every example runs as its docstring says, in a fresh process, and learns; image-text gradients are those of one batch."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hypercontrast as hc

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "examples").glob("*.py"))
ACCURACY = 0.75  # of one in ten; the least here is 0.83
TIMEOUT = 180


def run(name, ranks=0):
    """The last line that the example prints, alone or on as many ranks."""
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *program, str(ROOT / "examples" / f"{name}.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def figures(line):
    first, last, accuracy = map(float, re.search(r"loss (\S+) -> (\S+), \D*accuracy ([\d.]+)", line).groups())
    return first, last, accuracy


def need(*packages):
    missing = [package for package in ("sklearn", *packages) if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install '.[examples]'")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_short_and_explained(file):
    text = file.read_text()
    assert len(text.splitlines()) < 60
    docstring = text.split('"""')[1]
    for part in ("Look at: ", "pip install '.[examples]'", f"examples/{file.name}"):
        assert part in docstring
    assert f"[{file.name}]({file.name})" in (ROOT / "examples" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "package", "ranks"),
    [
        ("ddp", "sklearn", 2),
        ("lightning_module", "lightning", 0),
        pytest.param("solo_style", "sklearn", 0, marks=pytest.mark.slow),
        pytest.param("hf_trainer", "transformers", 0, marks=pytest.mark.slow),
        pytest.param("timm_loop", "timm", 0, marks=pytest.mark.slow),
        pytest.param("lightly_ssl", "lightly", 0, marks=pytest.mark.slow),
    ],
)
def test_learns(name, package, ranks):
    need(package)
    first, last, accuracy = figures(run(name, ranks))
    assert last < first - 0.5
    assert accuracy > ACCURACY


def test_all_are_run():
    tested = {"ddp", "lightning_module", "hf_trainer", "solo_style", "timm_loop", "lightly_ssl"}
    assert {file.stem for file in FILES} == tested | {"open_clip_style", "large_batch_supcon"}


def test_large_batch_is_exact_and_learns():
    need()
    line = run("large_batch_supcon")
    first, last, accuracy = figures(line)
    assert last < first - 0.5
    assert accuracy > ACCURACY
    assert float(line.rpartition(" ")[2]) < 1e-5  # float32, sums in another order


@pytest.mark.slow
def test_image_text_is_the_same_on_one_rank_and_two():
    need()
    one, two = (figures(run("open_clip_style", ranks)) for ranks in (1, 2))
    assert one == pytest.approx(two, abs=0.02)  # after 56 steps, rounding apart
    assert two[1] < two[0] - 0.5
    assert two[2] > ACCURACY


class ImageText(nn.Module):
    """The example's loss for `check_ddp`, which gives one matrix: its halves are images and texts."""

    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, features, labels):
        from open_clip_style import clip_loss

        images, texts = features.chunk(2, dim=1)
        return clip_loss(images, texts, self.logit_scale.neg().exp())


@pytest.mark.slow
def test_image_text_is_exact_under_ddp(monkeypatch):
    """For equal and unequal batches; the temperature's gradient too."""
    need()
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    verdict = hc.check_ddp(ImageText(), timeout=TIMEOUT)
    assert verdict, verdict
    assert verdict.loss_agrees
    assert not verdict.note
