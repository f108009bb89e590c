"""The compiled extension: what happens without it or with one that does not fit, how it builds, what nvcc makes of it."""

import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import hypercontrast as hc
from hypercontrast import _extension

ROOT = Path(__file__).resolve().parents[1]
VERSION = torch.__version__.split("+")[0]


@pytest.fixture
def load_afresh():
    """The loader as in a new process, put back afterwards."""
    forget()
    yield _extension.load
    forget()


def forget():
    _extension.found.cache_clear()
    _extension.load.cache_clear()


def use_buffer():
    g = torch.Generator().manual_seed(0)
    b = hc.NegativeBuffer(5, 6, queue=7, group=None)
    for n in (6, 3, 0, 5):
        got = b.gather(torch.randn(n, 5, generator=g), torch.arange(n))
        b.push()
    return [got.features.clone(), got.labels.clone(), *(x.clone() for x in b.queued())]


def built_for(torch_version, revision):
    module = types.ModuleType("hypercontrast._C")
    module.TORCH, module.REVISION = torch_version, revision
    return module


# None in sys.modules makes an import fail, as a missing file does.
MISFITS = [
    (None, r"hypercontrast\._C"),
    (
        built_for("2.0.1", _extension.REVISION),
        rf"built for torch 2\.0\.1, revision \d+, not for torch {re.escape(VERSION)}",
    ),
    (built_for(VERSION, 0), f"revision 0, not for torch .*, revision {_extension.REVISION}"),
]


@pytest.mark.parametrize(("module", "reason"), MISFITS)
def test_without_a_fitting_extension(module, reason, load_afresh, monkeypatch):
    """One warning with the reason and the command, and the same results."""
    with_what_is_there = use_buffer()
    forget()
    monkeypatch.setitem(sys.modules, "hypercontrast._C", module)
    with pytest.warns(UserWarning, match=reason) as warned:
        results = [use_buffer(), use_buffer()]
    assert len(warned) == 1
    assert "python setup.py build_ext --inplace" in str(warned[0].message)
    for result in results:
        for got, want in zip(result, with_what_is_there, strict=True):
            assert torch.equal(got, want)


@pytest.mark.filterwarnings("error")
def test_left_out_on_purpose(load_afresh, monkeypatch):
    monkeypatch.setenv("HYPERCONTRAST_NO_EXT", "1")
    assert load_afresh() is None
    use_buffer()


def test_revisions_agree():
    """The number in C++ and the one in Python are raised together."""
    header = (ROOT / "csrc" / "negative_buffer.h").read_text()
    assert int(re.search(r"kRevision = (\d+)", header)[1]) == _extension.REVISION


def test_import_neither_builds_nor_loads_it():
    code = "import sys, hypercontrast; print('hypercontrast._C' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert run.stdout == "False\n", run.stderr


# ---- the build


def lay_out(folder, broken=False):
    """setup.py with its sources, the package's folder for the result, and metadata that any setuptools can read."""
    shutil.copy(ROOT / "setup.py", folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "hypercontrast").mkdir()
    metadata = '[project]\nname = "hypercontrast"\nversion = "0"\n[tool.setuptools]\npackages = ["hypercontrast"]\n'
    (folder / "pyproject.toml").write_text(metadata)
    if broken:
        for source in (folder / "csrc").glob("*.c*"):
            source.write_text("#error broken on purpose\n")


def set_up(folder, *command, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", *command], cwd=folder, env={**os.environ, **environment}, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"HYPERCONTRAST_NO_EXT": "1"}, "HYPERCONTRAST_NO_EXT=1"), ({"CXX": "/no/compiler"}, "there is no C++ compiler")],
)
def test_setup_without_the_extension(environment, reason, tmp_path):
    lay_out(tmp_path)
    run = set_up(tmp_path, "build_ext", "--inplace", **environment)
    assert run.returncode == 0, run.stderr
    assert f"building without the C++ extension: {reason}" in run.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler")
def test_a_build_that_fails(tmp_path):
    """Asked for by name it is an error; an install goes on without it and says so."""
    lay_out(tmp_path, broken=True)
    assert set_up(tmp_path, "build_ext", "--inplace").returncode != 0
    run = set_up(tmp_path, "build")
    assert run.returncode == 0, run.stderr
    assert "building without the C++ extension: the build failed" in run.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler")
def test_it_builds(tmp_path):
    """From sources alone, with CUDA where there is a toolkit for this torch; what comes out loads and packs."""
    lay_out(tmp_path)
    run = set_up(tmp_path, "build_ext", "--inplace")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    (library,) = (tmp_path / "hypercontrast").glob("_C*.so")
    code = f"""
import importlib.util, torch, torch.distributed
spec = importlib.util.spec_from_file_location("hypercontrast._C", {str(library)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
rows, tails = torch.ones(2, 4), torch.ones(2, 2, dtype=torch.int64)
module.pack(rows, tails, torch.tensor([[3.0, 0, 4, 0]]), torch.tensor([7]), 5, True)
torch.testing.assert_close(rows, torch.tensor([[0.6, 0, 0.8, 0], [0, 0, 0, 0]]))
assert tails.tolist() == [[7, 5], [-(2**63), 5]]
print(module.TORCH, module.REVISION)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [VERSION, str(_extension.REVISION)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_sanitizers_find_nothing(tmp_path, figure):
    """Addresses and undefined behaviour, in the tests of what the extension computes."""
    found = (
        subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True).stdout
        for name in ("asan", "ubsan")
    )
    runtimes = [path.strip() for path in found]
    if not all(map(os.path.isabs, runtimes)):
        pytest.skip("this g++ has no sanitizers")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "hypercontrast", "kernels", "tests", "bench"):
        left_out = shutil.ignore_patterns("*.so", "__pycache__", "results")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=left_out)
    flags = "-fsanitize=address,undefined"
    run = set_up(
        tmp_path, "build_ext", "--inplace", CXX="g++", CFLAGS=f"{flags} -fno-omit-frame-pointer", LDFLAGS=flags
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    environment = {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(tmp_path)}
    tests = [f"tests/test_{name}.py" for name in ("compiled", "tiles", "fuzz", "buffer")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], cwd=tmp_path, capture_output=True,
        env={**os.environ, **environment}, text=True, timeout=1200,
    )  # fmt: skip
    said = run.stdout + run.stderr
    assert run.returncode == 0, said[-4000:]
    assert "AddressSanitizer" not in said
    assert "runtime error" not in said
    assert "extension is not built" not in said, "nothing was tested"
    figure("R13", f"C++ on a CPU under address and undefined-behaviour sanitizers: {said.strip().splitlines()[-1]}")


def nvcc_knows(architecture):
    listed = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    return f"compute_{architecture}" in listed


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_cuda_compiles_cleanly(architecture, tmp_path):
    """pack.cu by itself, without torch's headers but with its switches: every combination of dtypes, no spills."""
    if not nvcc_knows(architecture):
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    switches = ["-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__", "-D__CUDA_NO_BFLOAT16_CONVERSIONS__"]
    command = ["nvcc", "-cubin", f"-arch=sm_{architecture}", "-std=c++17", "-Werror=all-warnings", *switches]
    command += ["-Xptxas=-v,-warn-spills", "-o", str(tmp_path / "pack.cubin"), str(ROOT / "csrc" / "pack.cu")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    assert usage == [("0", "0", "0")] * 16
