"""The doctor is right: about this machine, about what is missing or broken, and about how to mend it."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from test_fallbacks import EXTENSION, ROOT, missing, stands_in

import hypercontrast as hc
from hypercontrast import doctor
from hypercontrast.data import DATASETS

PROGRAM = "import sys\nfrom hypercontrast.doctor import main\nsys.exit(main(['--json']))"


def examined(before="", environment=None, cwd=ROOT):
    """Exit code, and findings by part, of an installation that differs from this one by what comes before."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HYPERCONTRAST_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-c", f"{before}\n{PROGRAM}"], capture_output=True, text=True, timeout=120, cwd=cwd,
        env={**clean, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **(environment or {})}, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    return done.returncode, {finding["part"]: finding for finding in json.loads(done.stdout)}


def test_this_machine():
    code, found = examined()
    needed = ("torch", "losses", "torchvision", "driver", "runs")
    assert {part: found[part]["state"] for part in needed} == dict.fromkeys(needed, "OK")
    assert code == 0
    assert found["torch"]["found"].startswith(torch.__version__)
    assert found["losses"]["found"].startswith("cpu: blockwise, within ")
    assert (found["GPUs"]["state"], found["mnist5k"]["state"]) == ("OPTIONAL", "OK")
    built = any((ROOT / "hypercontrast").glob("_C*.so"))
    assert (found["extension"]["state"] == "OK") == built
    assert set(DATASETS) <= found.keys()
    assert [part for part, finding in found.items() if finding["state"] == "MISSING"] == []
    assert all(bool(finding["fix"]) == (finding["state"] != "OK") for part, finding in found.items() if part != "GPUs")


NMS = "raise RuntimeError('operator torchvision::nms does not exist')"


@pytest.mark.parametrize(
    ("before", "environment", "part", "state", "says", "fix"),
    [
        (missing("triton"), {}, "Triton", "OPTIONAL", "kernels on a GPU would need it: No module", "pip install triton"),
        pytest.param(stands_in("triton", "raise ImportError('libtriton.so: bad')"), {}, "Triton", "OPTIONAL", "libtriton.so: bad", "pip install triton", marks=pytest.mark.slow),
        (stands_in("torchvision", NMS), {}, "torchvision", "MISSING", "does not fit this torch: operator torchvision::nms", "pip install 'torchvision==0."),
        pytest.param(missing("torchvision"), {}, "torchvision", "MISSING", "ResNets, ViTs and CIFAR's archives need it", "pip install 'torchvision==0.", marks=pytest.mark.slow),
        pytest.param(missing(EXTENSION), {}, "extension", "OPTIONAL", "the same results, slower on a CPU: No module", "setup.py build_ext --inplace", marks=pytest.mark.slow),
        (stands_in(EXTENSION, "module.TORCH, module.REVISION = '2.0.1', 2"), {}, "extension", "OPTIONAL", "built for torch 2.0.1", "setup.py build_ext --inplace"),
        pytest.param(missing(EXTENSION), {"PATH": ""}, "extension", "OPTIONAL", "slower", "install a C++ compiler (such as g++), then cd ", marks=pytest.mark.slow),
        pytest.param("", {"HYPERCONTRAST_NO_EXT": "1"}, "extension", "OPTIONAL", "left out, as HYPERCONTRAST_NO_EXT=1 asks", "unset HYPERCONTRAST_NO_EXT", marks=pytest.mark.slow),
        (missing("tyro"), {}, "driver", "MISSING", "without tyro (flags)", f"pip install -e '{ROOT}[train]'"),
        pytest.param(missing("yaml") + missing("safetensors"), {}, "driver", "MISSING", "without PyYAML (recipes and config.yaml), safetensors", "[train]'", marks=pytest.mark.slow),
        pytest.param("", {"HYPERCONTRAST_BACKEND": "triton"}, "losses", "MISSING", "backend='triton' needs features on a GPU", "HYPERCONTRAST_BACKEND=blockwise", marks=pytest.mark.slow),
        pytest.param("", {"HYPERCONTRAST_BACKEND": "fast"}, "losses", "MISSING", "HYPERCONTRAST_BACKEND must be", "HYPERCONTRAST_BACKEND=blockwise", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_what_is_missing_and_how_to_mend_it(before, environment, part, state, says, fix):
    code, found = examined(before, environment)
    assert found[part]["state"] == state
    assert says in found[part]["found"]
    assert fix in found[part]["fix"]
    assert code == (state == "MISSING")
    others = [name for name, finding in found.items() if finding["state"] == "MISSING" and name != part]
    assert others == []


def test_the_fixes_name_versions_that_fit(monkeypatch):
    """As torch 2.11 asks for: torchvision 0.26, and of a CUDA build its own Triton."""
    monkeypatch.setattr(torch, "__version__", "2.13.1+cpu")
    monkeypatch.setattr(doctor, "_failure", lambda module: "not there")
    assert doctor._torchvision().fix.endswith("pip install 'torchvision==0.28.*'")
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ["numpy", 'triton==3.7.1; platform == "x"'])
    assert doctor._triton().fix.endswith("pip install triton==3.7.1")
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: None)
    assert doctor._triton().fix.endswith("pip install triton")


def test_an_installed_package_is_built_from_a_checkout(monkeypatch, tmp_path):
    """Of its name an index has nothing, or somebody else's."""
    monkeypatch.setattr(doctor, "CHECKOUT", tmp_path)
    fix = doctor._build()
    assert "in a checkout of the repository " in fix
    assert fix.endswith("pip install --no-build-isolation --no-deps .")


def test_an_old_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
    finding = doctor._torch()
    assert finding.state == "MISSING"
    assert finding.found.endswith("the package needs 2.11 or newer")
    assert finding.fix.endswith("pip install 'torch>=2.11'")


def test_a_gpu_needs_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert doctor._triton().state == "OK"
    monkeypatch.setattr(doctor, "_failure", lambda module: "not there")
    assert doctor._triton().state == "MISSING"


@pytest.mark.parametrize(("cuda", "says"), [(None, "this torch is built for the CPU"), ("13.0", "cannot use it")])
def test_a_gpu_that_torch_does_not_use(cuda, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    finding = doctor._gpus()
    assert finding.state == "MISSING"
    assert says in finding.found
    assert finding.fix


def test_several_gpus_need_nccl(monkeypatch):
    assert doctor._collectives().state == "OK"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert doctor._collectives().state == "MISSING"


def test_a_loss_that_is_wrong(monkeypatch):
    right = hc.nonl_loss
    monkeypatch.setattr(
        hc,
        "nonl_loss",
        lambda *x, backend, **options: right(*x, backend=backend, **options) * (1 + (backend == "auto")),
    )
    finding = doctor._losses("cpu")
    assert finding.state == "MISSING"
    assert "cpu: blockwise is off the specification by " in finding.found


def test_a_loss_that_is_nan(monkeypatch):
    right = hc.nonl_loss
    monkeypatch.setattr(hc, "nonl_loss", lambda *x, **options: right(*x, **options) * torch.nan)
    assert doctor._losses("cpu").state == "MISSING"


def test_where_runs_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "runs").write_text("")
    code, found = examined(cwd=tmp_path)
    assert (code, found["runs"]["state"]) == (1, "MISSING")
    assert found["runs"]["found"] == "runs cannot be written: Not a directory"
    monkeypatch.chdir(tmp_path.parent)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**20, 2**20))
    finding = doctor._folder("runs", Path("new", "runs"), "elsewhere")
    assert (finding.state, finding.found) == ("MISSING", f"{Path('new', 'runs')}: 1 MiB free, at least 1,024 needed")


def test_data_sets_are_looked_for_where_it_is_told(tmp_path, capsys):
    code = doctor.main(["--data-root", str(tmp_path), "--json"])
    found = {finding["part"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert code == 0
    assert found["cifar100"]["state"] == "OPTIONAL"
    assert str(tmp_path / "cifar100") in found["cifar100"]["fix"]
    (tmp_path / "cifar-100-python").mkdir()
    assert doctor._dataset("cifar100", str(tmp_path)).state == "OK"


def test_it_prints_a_line_a_part_and_the_fix_below(monkeypatch, capsys):
    findings = [
        doctor.Finding("OK", "torch", "2.11"),
        doctor.Finding("MISSING", "driver", "without tyro", "pip install it"),
    ]
    monkeypatch.setattr(doctor, "check", lambda root: iter(findings))
    assert doctor.main([]) == 1
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.startswith(f"hypercontrast {hc.__version__}")
    assert [line.strip() for line in lines if line] == [
        "OK        torch             2.11", "MISSING   driver            without tyro", "pip install it", "missing: driver",
    ]  # fmt: skip
    assert doctor.main(["--quiet"]) == 1
    assert capsys.readouterr().out.splitlines() == lines[2:4]
    findings.pop()
    assert doctor.main([]) == 0
    assert capsys.readouterr().out.endswith("\nNothing is missing.\n")
