"""The distributions hold what they need and nothing else, and work where they are installed.

Everything is built in a copy of the checkout without a network, and tried in fresh environments which see this one's
packages (torch among them) by a .pth file: --system-site-packages would show those of the base Python instead, and this
one's own editable install of the checkout stays out of sight.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import hypercontrast as hc

ROOT = Path(__file__).parents[1]
FOLDERS = ("bench", "csrc", "docs", "hypercontrast", "kernels", "tests")
NOT_COPIED = shutil.ignore_patterns("*.so", "__pycache__", "results")

LOSS = """
import pathlib, torch, hypercontrast as hc
from hypercontrast import _extension, config
z = torch.arange(24.0).sin().reshape(6, 4)
w = torch.arange(12.0).cos().reshape(3, 4)
loss = hc.nonl_loss(z, w, torch.tensor([0, 1, 2, 0, 1, 2]))
"""
REPORT = """
package = pathlib.Path(hc.__file__).parent
print(package)
print(f"{loss.item():.6f}")
print(len(list(config.RECIPES.glob("*.yaml"))), (package / "py.typed").exists(), (package / "kernels" / "prototype_lse.py").exists())
print(_extension.load() is not None)
"""


def can_build_wheels():
    if importlib.util.find_spec("wheel") is not None:
        return True
    version = importlib.metadata.version("setuptools").split(".")
    return (int(version[0]), int(version[1])) >= (70, 1)


pytestmark = pytest.mark.skipif(not can_build_wheels(), reason="building a wheel needs setuptools 70.1 or wheel")


def pure():
    return {**os.environ, "HYPERCONTRAST_NO_EXT": "1"}


def run(*command, cwd, env=None):
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def backend(step, cwd):
    """The file that a step of the build backend makes, without isolation."""
    code = f"from setuptools import build_meta; print(build_meta.{step}('dist'))"
    return cwd / "dist" / run(sys.executable, "-c", code, cwd=cwd, env=pure()).splitlines()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy as a clone has it: the link to kernels/ is one."""
    copy = tmp_path_factory.mktemp("checkout") / "hypercontrast"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=NOT_COPIED)
    for path in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(path, copy)
    assert (copy / "hypercontrast" / "kernels").is_symlink()
    return copy


@pytest.fixture(scope="module")
def sdist(checkout):
    return backend("build_sdist", checkout)


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """From the source distribution, as an installer gets it."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    return backend("build_wheel", unpacked)


@pytest.fixture
def environment(tmp_path):
    """The Python of a fresh environment. What it has itself comes before what it sees of this one."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    packages = run(python, "-Ic", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    seen = [path for path in sys.path if os.path.isdir(path) and Path(path).resolve() != ROOT]
    (Path(packages) / "parent.pth").write_text("\n".join(seen))
    return python


def install(python, *what, env=None):
    options = "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"
    run(python, "-m", "pip", "install", *options, *what, cwd=python.parent, env=env or pure())


def works(python, where, *, extension=False, env=None):
    """The package is that of `where`, whole, and gives the checkout's loss."""
    isolated = "-c" if env else "-Ic"
    place, loss, files, extended = run(python, isolated, LOSS + REPORT, cwd=python.parent, env=env).splitlines()
    names = {}
    exec(LOSS, names)
    recipes = len(list((ROOT / "hypercontrast" / "recipes").glob("*.yaml")))
    assert Path(place).is_relative_to(where)
    assert float(loss) == pytest.approx(names["loss"].item(), abs=2e-6)
    assert files == f"{recipes} True True"
    assert extended == str(extension)


def tracked(folder, *endings):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.suffix in endings or path.name in endings}


def test_sdist_builds_the_extension_and_no_more(sdist):
    assert sdist.name == f"hypercontrast-{hc.__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)  # no link that leads out of the archive
    names = {Path(*Path(member.name).parts[1:]).as_posix() for member in members if member.isfile()}
    wanted = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    wanted |= {f"hypercontrast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    wanted |= {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff"}
    assert wanted - names == set()
    assert [
        name for name in names if name.startswith(("tests", "docs", "bench")) or name.endswith((".so", ".pyc"))
    ] == []


def test_wheel_without_the_extension_is_pure_and_complete(wheel):
    assert wheel.name == f"hypercontrast-{hc.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name) for name in archive.namelist()}
        metadata = HeaderParser().parsestr(archive.read(f"{wheel.name.split('-py3')[0]}.dist-info/METADATA").decode())
    package = {
        Path("hypercontrast") / path for path in tracked(ROOT / "hypercontrast", ".py", ".yaml", ".txt", "py.typed")
    }
    package |= {Path("hypercontrast/kernels") / path for path in tracked(ROOT / "kernels", ".py")}
    assert {name for name in names if name.parts[0] == "hypercontrast"} == package
    assert {name.parts[0] for name in names} == {"hypercontrast", f"hypercontrast-{hc.__version__}.dist-info"}
    assert metadata["Version"] == hc.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert {"train", "demo", "test", "docs", "bench"} <= set(metadata.get_all("Provides-Extra"))
    unconditional = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert unconditional == ["torch>=2.11", "numpy"]


def test_the_command_is_installed(wheel, environment):
    install(environment, wheel)
    command = environment.parent / "hypercontrast"
    assert run(command, "--version", cwd=environment.parent) == f"hypercontrast {hc.__version__}\n"
    assert run(command, "report", "--help", cwd=environment.parent).startswith("usage: hypercontrast report [-h]")


def test_wheel_works_in_a_fresh_environment(wheel, environment):
    install(environment, wheel)
    works(environment, environment.parents[1])


def test_bare_checkout_works(checkout, environment):
    works(environment, checkout, env={"PATH": os.environ["PATH"], "PYTHONPATH": str(checkout)})


@pytest.mark.slow
def test_pip_install_of_the_checkout(checkout, environment):
    install(environment, checkout)
    works(environment, environment.parents[1])


@pytest.mark.slow
def test_editable_install(checkout, environment):
    install(environment, "--editable", checkout)
    works(environment, checkout)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
def test_install_with_the_extension(checkout, environment):
    install(environment, checkout, env={**os.environ, "HYPERCONTRAST_NO_EXT": "0"})
    works(environment, environment.parents[1], extension=True)


def test_version_stands_in_one_place_and_in_the_changelog():
    assert (
        f"({hc.__version__})" in (ROOT / "CHANGELOG.md").read_text()
        or f"## {hc.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    )
    assert '\nversion = "' not in (ROOT / "pyproject.toml").read_text()


def test_citation_names_the_software_and_the_paper():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["title"] == "hypercontrast"
    assert citation["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2605.20302"}]
