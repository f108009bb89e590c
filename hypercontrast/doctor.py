"""Is all here that the package needs on this machine? A line a part, with the command that mends what is missing.

    python -m hypercontrast.doctor [--data-root DIR] [--quiet] [--json]

States
- OK: there, and it works.
- OPTIONAL: not there, and what is here runs without it; the line says what it would add.
- MISSING: not there or broken, and something that the others need fails without it.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import hypercontrast as hc
from hypercontrast import _extension
from hypercontrast.config import Config, UsageError
from hypercontrast.data import DATASETS, locate
from hypercontrast.environment import environment, version
from hypercontrast.output import say
from hypercontrast.progress import Parser, command, fail, python, to_json

OK, OPTIONAL, MISSING = "OK", "OPTIONAL", "MISSING"
CHECKOUT = Path(__file__).resolve().parents[1]
# Imported as, installed as, and what takes it.
DRIVER = {
    "tyro": ("tyro", "flags"),
    "yaml": ("PyYAML", "recipes and config.yaml"),
    "safetensors": ("safetensors", "checkpoints"),
    "rich": ("rich", "progress bars"),
    "pyarrow": ("pyarrow", "data sets in Parquet"),
}
EXTRAS = {
    "timm": ("timm", "--model timm:NAME"),
    "scipy": ("transfer", "transfer to Stanford Cars and Flowers"),
    "imagecorruptions": ("robust", "corrupting the run's own pictures"),
    "matplotlib": ("bench", "the pictures of python -m bench"),
}
ROOM = 2**30  # bytes on the disk that runs are written to
TOLERANCE = 1e-4  # of the losses against the specification, in float32 and where a GPU multiplies in TF32


@dataclass(frozen=True)
class Finding:
    """What there is of a part, and where it is not OK what to do."""

    state: str
    part: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{self.state:<8}  {self.part:<16}  {self.found}"
        return f"{line}\n{'':<28}{self.fix}" if self.fix else line


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if nothing is missing, 1 if something is; 2 with one line on stderr for a mistake in the call; 130 if
    interrupted.
    """
    findings = []
    try:
        args = parser().parse_args(argv)
        if not (args.quiet or args.json):
            here = environment(torch.device("cpu"), 1)
            say(f"hypercontrast {here['hypercontrast']}, Python {here['Python']}, {here['machine']}\n")
        for finding in check(args.data_root):
            findings.append(finding)
            if not args.json and not (args.quiet and finding.state != MISSING):
                say(finding)
    except UsageError as error:
        return fail(2, str(error))
    except KeyboardInterrupt:
        return fail(130, "interrupted")
    missing = [finding.part for finding in findings if finding.state == MISSING]
    if args.json:
        say(to_json([dataclasses.asdict(finding) for finding in findings]))
    elif not args.quiet:
        say(f"\nmissing: {', '.join(missing)}" if missing else "\nNothing is missing.")
    return 1 if missing else 0


def parser() -> Parser:
    parser = Parser(prog=command("doctor"), description="What is here, what is missing, and the command that mends it.")
    parser.add_argument("--data-root", default=Config.data_root, help="where the named data sets are looked for")
    parser.add_argument("--quiet", action="store_true", help="print what is missing alone")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON: state, part, found, fix")
    return parser


def check(data_root: str = Config.data_root) -> Iterator[Finding]:
    """One finding after the other, each as soon as it is known."""
    yield _torch()
    yield _gpus()
    yield _triton()
    yield _extension_found()
    yield _collectives()
    yield _losses("cpu")
    if torch.cuda.is_available():
        yield _losses("cuda")
    yield _torchvision()
    yield _driver()
    for module, (extra, use) in EXTRAS.items():
        yield _extra(module, extra, use)
    for name in DATASETS:
        yield _dataset(name, data_root)
    yield _folder("runs", Path("runs"), "--run-dir FOLDER writes elsewhere")
    if torch.cuda.is_available():
        cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
        yield _folder("kernels", cache, "TRITON_CACHE_DIR=FOLDER keeps compiled kernels elsewhere")


def _pip(what: str) -> str:
    return f"{python()} -m pip install {what}"


def _extra_install(extra: str) -> str:
    """How to install an extra of ours, in a checkout or where the package is installed."""
    in_checkout = (CHECKOUT / "pyproject.toml").is_file()
    return _pip(f"-e '{CHECKOUT}[{extra}]'" if in_checkout else f"'hypercontrast[{extra}]'")


def _failure(module: str) -> str:
    """Why it cannot be imported, in one line; empty where it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken package may raise anything
        return " ".join(f"{error}".split()) or type(error).__name__
    return ""


def _torch_release() -> tuple[int, int]:
    major, minor = re.findall(r"\d+", torch.__version__)[:2]
    return int(major), int(minor)


def _torch() -> Finding:
    built = f"{torch.__version__}, {f'for CUDA {torch.version.cuda}' if torch.version.cuda else 'for the CPU'}"
    if _torch_release() < (2, 11):
        return Finding(MISSING, "torch", f"{built}; the package needs 2.11 or newer", _pip("'torch>=2.11'"))
    return Finding(OK, "torch", built)


def _gpus() -> Finding:
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        return Finding(
            OK, "GPUs", ", ".join(f"{c.name} (sm_{c.major}{c.minor}, {c.total_memory / 2**30:.0f} GiB)" for c in cards)
        )
    if not (Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")):
        return Finding(OPTIONAL, "GPUs", "none on this machine: everything runs on its CPU cores")
    if torch.version.cuda is None:
        return Finding(
            MISSING,
            "GPUs",
            "there is one, but this torch is built for the CPU",
            _pip("--force-reinstall torch") + ", from an index that has builds for CUDA",
        )
    return Finding(
        MISSING,
        "GPUs",
        f"there is one, but this torch cannot use it: {_cuda_failure()}",
        f"install a driver for CUDA {torch.version.cuda} or newer (nvidia-smi names the installed one's), or make the"
        " device visible (CUDA_VISIBLE_DEVICES)",
    )


def _cuda_failure() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "it sees no device"


def _triton() -> Finding:
    failure = _failure("triton")
    if not failure:
        return Finding(OK, "Triton", version("triton") or "without a version")
    # A build of torch for CUDA names the version that it is for.
    pinned = [re.match(r"triton==([\w.]+)", need) for need in importlib.metadata.requires("torch") or ()]
    fix = _pip(next((f"triton=={match[1]}" for match in pinned if match), "triton"))
    if torch.cuda.is_available():
        return Finding(MISSING, "Triton", f"the kernels of the losses on a GPU need it: {failure}", fix)
    return Finding(OPTIONAL, "Triton", f"kernels on a GPU would need it: {failure}", fix)


def _extension_found() -> Finding:
    module, reason = _extension.found()
    if module is not None:
        compiled = "C++ and CUDA" if module.CUDA else "C++"
        if module.CUDA or not torch.cuda.is_available():
            products = ", products on a CPU by oneDNN" if module.takes_onednn() else ""
            return Finding(OK, "extension", compiled + products)
        return Finding(OPTIONAL, "extension", f"{compiled} alone: with nvcc the buffer packs in one launch", _build())
    if not reason:
        return Finding(OPTIONAL, "extension", "left out, as HYPERCONTRAST_NO_EXT=1 asks", "unset HYPERCONTRAST_NO_EXT")
    return Finding(OPTIONAL, "extension", f"the same results, slower on a CPU: {reason}", _build())


def _build() -> str:
    compiler = "" if shutil.which("c++") or shutil.which("g++") else "install a C++ compiler (such as g++), then "
    if (CHECKOUT / "setup.py").is_file():
        return f"{compiler}cd {CHECKOUT} && {_pip('ninja')} && {python()} setup.py build_ext --inplace"
    # No index has the package, and setuptools older than that builds wheels by another package.
    tools = _pip("'setuptools>=70.1,<82' ninja")
    return f"{compiler}in a checkout of the repository {tools} && {_pip('--no-build-isolation --no-deps .')}"


def _collectives() -> Finding:
    there = [
        name
        for name, available in (("NCCL", dist.is_nccl_available), ("Gloo", dist.is_gloo_available))
        if dist.is_available() and available()
    ]
    if "NCCL" in there:
        there[0] += f" {'.'.join(map(str, torch.cuda.nccl.version()))}"
    elif torch.cuda.device_count() > 1:
        return Finding(MISSING, "ranks", "this torch has no NCCL, which ranks on GPUs talk by", _pip("'torch>=2.11'"))
    if not there:
        return Finding(OPTIONAL, "ranks", "this torch has neither NCCL nor Gloo: one rank alone", _pip("'torch>=2.11'"))
    return Finding(OK, "ranks", ", ".join(there))


def _losses(device: str) -> Finding:
    """A loss and its gradients against the specification: tried, not argued."""
    generator = torch.Generator().manual_seed(0)
    features, prototypes = (torch.randn(n, 32, generator=generator).to(device) for n in (64, 10))
    labels = torch.randint(10, (64,), generator=generator).to(device)
    results: dict[str, list[torch.Tensor]] = {}
    try:
        for backend in ("auto", "reference"):
            z, w = (x.clone().requires_grad_() for x in (features, prototypes))
            loss = hc.nonl_loss(z, w, labels, backend=backend, group=None)
            results[backend] = [loss.detach(), *torch.autograd.grad(loss, (z, w))]
        name = hc.resolve_backend("auto", features)
    except Exception as error:  # a compiler or a driver may raise anything
        said = " ".join(str(error).split())
        return Finding(MISSING, "losses", f"{device}: {said}", "HYPERCONTRAST_BACKEND=blockwise runs without kernels")
    off = max(float((ours - true).abs().max()) for ours, true in zip(*results.values(), strict=True))
    if not off < TOLERANCE:
        return Finding(MISSING, "losses", f"{device}: {name} is off the specification by {off:.0e}", "report this line")
    return Finding(OK, "losses", f"{device}: {name}, within {off:.0e} of the specification")


def _torchvision() -> Finding:
    failure = _failure("torchvision")
    if not failure:
        return Finding(OK, "torchvision", version("torchvision") or "without a version")
    major, minor = _torch_release()
    # torch 2.N comes with torchvision 0.(N + 15).
    fix = _pip(f"'torchvision==0.{minor + 15}.*'" if major == 2 else "torchvision")
    here = f"{version('torchvision')} does not fit this torch" if version("torchvision") else "not installed"
    return Finding(MISSING, "torchvision", f"ResNets, ViTs and CIFAR's archives need it; {here}: {failure}", fix)


def _driver() -> Finding:
    lacking = [f"{name} ({use})" for module, (name, use) in DRIVER.items() if _failure(module)]
    if lacking:
        return Finding(MISSING, "driver", f"without {', '.join(lacking)}", _extra_install("train"))
    return Finding(OK, "driver", ", ".join(f"{name} {version(name)}" for name, _ in DRIVER.values()))


def _extra(module: str, extra: str, use: str) -> Finding:
    if importlib.util.find_spec(module) is None:
        return Finding(OPTIONAL, module, f"for {use}", _extra_install(extra))
    return Finding(OK, module, f"for {use}")


def _dataset(name: str, root: str) -> Finding:
    try:
        locate(name, root)
    except UsageError as error:
        fix = _extra_install("demo") if name == Config.dataset else str(error)
        return Finding(OPTIONAL, name, "not there", fix)
    return Finding(OK, name, "there" if name == Config.dataset else f"in {Path(root, name)}")


def _folder(part: str, folder: Path, otherwise: str) -> Finding:
    """Whether files can be written below `folder`, which need not exist."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free
    except OSError as error:
        return Finding(MISSING, part, f"{folder} cannot be written: {error.strerror}", otherwise)
    if free < ROOM:
        return Finding(MISSING, part, f"{folder}: {free / 2**20:.0f} MiB free, at least 1,024 needed", otherwise)
    return Finding(OK, part, f"{folder} can be written, {free / 2**30:.0f} GiB free")


if __name__ == "__main__":
    sys.exit(main())
