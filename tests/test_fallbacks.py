"""What may be missing or broken around the package: it imports, says so once at most, and computes the same.

Every case is a process of its own, as an installation that lacks something would be.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Losses, gradients and a buffer with a queue, against the specification and as a digest of their bits.
PROGRAM = """
import hashlib, json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    import hypercontrast as hc
    torch.set_num_threads(1)
    torch.manual_seed(0)
    digest, worst = hashlib.sha256(), 0.0
    features, prototypes = torch.randn(40, 16), torch.randn(7, 16)
    labels = torch.randint(0, 7, (40,))
    calls = {
        "ntce": lambda f, p, b: hc.ntce_loss(f, p, labels, backend=b),
        "nonl": lambda f, p, b: hc.nonl_loss(f, p, labels, backend=b),
        "normface": lambda f, p, b: hc.normface_loss(f, p, labels, backend=b),
        "supcon": lambda f, p, b: hc.supcon_loss(f, labels, backend=b) + 0 * p.sum(),
    }
    for call in calls.values():
        results = []
        for backend in ("auto", "reference"):
            leaves = [x.clone().requires_grad_() for x in (features, prototypes)]
            loss = call(*leaves, backend)
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        for ours, eager in zip(*results):
            digest.update(ours.numpy().tobytes())
            worst = max(worst, float((ours - eager).abs().max()))
    buffer = hc.NegativeBuffer(16, 8, queue=20, group=None)
    for n in (8, 3, 8):
        rows = buffer.gather(features[:n], labels[:n])
        buffer.push()
        for x in (rows.features, rows.labels, *buffer.queued()):
            digest.update(x.numpy().tobytes())
said = [str(w.message) for w in caught]
print(json.dumps({"digest": digest.hexdigest(), "worst": worst, "warnings": said}))
"""
FINDER = """
import importlib.abc, importlib.util, sys
class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, name):
        self.name = name
    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            return importlib.util.spec_from_loader(name, self)
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        {body}
sys.meta_path.insert(0, Finder({name!r}))
"""


def stands_in(name, body):
    """What makes an import of `name` run this instead."""
    return FINDER.format(name=name, body=body)


def missing(name):
    return stands_in(name, "raise ModuleNotFoundError(f'No module named {self.name!r}', name=self.name)")


EXTENSION = "hypercontrast._C"
# What happens before the program, the environment, and the warnings that are due.
CASES = {
    "no Triton": (missing("triton"), {}, 0),
    "a Triton that does not load": (stands_in("triton", "raise ImportError('libtriton.so: undefined symbol')"), {}, 0),
    "no torchvision": (missing("torchvision"), {}, 0),
    "a torchvision for another torch": (
        stands_in("torchvision", "raise RuntimeError('operator torchvision::nms does not exist')"),
        {},
        0,
    ),
    "no compiler": ("", {"PATH": "", "CXX": "/no/compiler", "CC": "/no/compiler"}, 0),
    "no extension": (missing(EXTENSION), {}, 1),
    "no extension, as asked for": ("", {"HYPERCONTRAST_NO_EXT": "1"}, 0),
    "an extension for another torch": (stands_in(EXTENSION, "module.TORCH, module.REVISION = '2.0.1', 2"), {}, 1),
    "an extension of another revision": (
        stands_in(EXTENSION, "import torch; module.TORCH, module.REVISION = torch.__version__.split('+')[0], 0"),
        {},
        1,
    ),
    "an extension of nobody's": (stands_in(EXTENSION, "pass"), {}, 1),
    "an extension with symbols of another torch": (
        stands_in(EXTENSION, "raise ImportError('undefined symbol: _ZN3c105ErrorC2E')"),
        {},
        1,
    ),
    "none of them": (missing("triton") + missing("torchvision") + missing(EXTENSION), {"PATH": ""}, 1),
}


def ran(before="", environment=None, program=PROGRAM, cwd=ROOT):
    clean = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "HYPERCONTRAST_NO_EXT")}
    run = subprocess.run(
        [sys.executable, "-c", before + program], capture_output=True, text=True, timeout=300, cwd=cwd,
        env={**clean, "OMP_NUM_THREADS": "1", **(environment or {})}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


SOME = ("no Triton", "no torchvision", "no compiler", "an extension for another torch", "none of them")


@pytest.mark.parametrize("cases", [SOME, pytest.param(tuple(CASES), marks=pytest.mark.slow)], ids=["some", "all"])
def test_fallbacks(cases, figure):
    # The extension's exponentials are its own, those of its twin PyTorch's.
    bits = {ran()["digest"], ran(environment={"HYPERCONTRAST_NO_EXT": "1"})["digest"]}
    worst, failures = 0.0, []
    for name in cases:
        before, environment, warnings = CASES[name]
        found = ran(before, environment)
        worst = max(worst, found["worst"])
        if found["digest"] not in bits:
            failures.append(f"{name}: other bits")
        if len(found["warnings"]) != warnings:
            failures.append(f"{name}: {found['warnings']}")
    assert not failures, "\n".join(failures)
    assert worst < 1e-5
    figure(
        "R17",
        f"{len(cases)} of {len(cases)} installations that lack a part: imported, at most 1 warning, the bits of"
        f" the whole one with or without the extension, {worst:.0e} from eager",
    )


TORCHVISION = """
import json
from hypercontrast.config import UsageError
from hypercontrast.models import build_model
try:
    build_model("resnet18", 3, 32)
except UsageError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.parametrize("name", ["no torchvision", "a torchvision for another torch"])
def test_what_needs_torchvision_says_so(name):
    assert "model resnet18 needs" in ran(CASES[name][0], program=TORCHVISION)


@pytest.mark.skipif(not list((ROOT / "hypercontrast").glob("_C*.so")), reason="the extension is not built")
def test_a_file_that_is_no_library(tmp_path):
    """In the package's folder, as from another system or a download that never began; the rest are links to ours."""
    package = tmp_path / "hypercontrast"
    package.mkdir()
    for path in (ROOT / "hypercontrast").iterdir():
        if path.suffix == ".so":
            (package / path.name).write_bytes(path.read_bytes()[:10])
        elif path.name != "__pycache__":
            (package / path.name).symlink_to(path.resolve())
    found = ran(cwd=tmp_path, environment={"PYTHONPATH": str(tmp_path)})
    assert len(found["warnings"]) == 1
    assert "hypercontrast runs without its C++ extension" in found["warnings"][0]
    assert found["digest"] == ran(environment={"HYPERCONTRAST_NO_EXT": "1"})["digest"]
