"""What the README shows, works as written."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hypercontrast.config import parse

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
LINES = [line.partition("#")[0].strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]


def test_python_blocks_run(capsys):
    names = {
        "F": F,
        "features": torch.randn(8, 4),
        "prototypes": torch.randn(3, 4),
        "labels": torch.randint(0, 3, (8,)),
    }
    blocks = [text for kind, text in BLOCKS if kind == "python"]
    assert len(blocks) == 4
    for text in blocks:
        exec(text, names)
    assert 0 <= float(capsys.readouterr().out) <= 2


@pytest.mark.parametrize("line", [line for line in LINES if "hypercontrast.train" in line and "--help" not in line])
def test_training_commands_parse(line):
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "hypercontrast.train"]
    parse(words[3:])


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {word for line in LINES if line.startswith("make ") for word in line.split()[1:]}
    assert named
    assert named <= targets


def test_links_point_to_files():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
