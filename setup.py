"""Builds the optional extension hypercontrast._C: the negative buffer in C++ and CUDA, and the CPU losses' inner loop.

    python setup.py build_ext --inplace         in a checkout whose Python has torch; fails loudly
    pip install --no-build-isolation -e .       an install with the extension, where it can be built
    pip install .                               builds apart from torch, so pure Python

CUDA comes along when nvcc and torch are of the same major CUDA version. HYPERCONTRAST_NO_EXT=1 skips the extension.
Without it everything works: hypercontrast/buffer.py and hypercontrast/tiles.py have Python twins.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import sys

from setuptools import setup

SOURCES = [
    "csrc/bindings.cpp",
    "csrc/negative_buffer.cpp",
    "csrc/pair_loss.cpp",
    "csrc/product.cpp",
    "csrc/prototype_loss.cpp",
    "csrc/tiles.cpp",
]
CUDA_SOURCES = ["csrc/pack.cu"]


def obstacle() -> str | None:
    """Why no extension can be built here."""
    if os.environ.get("HYPERCONTRAST_NO_EXT") == "1":
        return "HYPERCONTRAST_NO_EXT=1"
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "there is no C++ compiler (c++, or the one that CXX names)"
    try:
        import torch.distributed
    except ImportError:
        return "torch is not there to build against: install it and use --no-build-isolation"
    return None if torch.distributed.is_available() else "this torch comes without torch.distributed"


def cuda_toolkit() -> tuple[str, tuple[int, int]] | None:
    """Folder and version of the CUDA toolkit, where there is one that fits torch."""
    import torch

    home = os.environ.get("CUDA_HOME")
    nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc")
    if torch.version.cuda is None or nvcc is None:
        return None
    try:
        # nvcc's own word: the one on the path may be a wrapper, from whose place nothing follows.
        told = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True)
        release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    top, version = re.search(r"^#\$ _?TOP=(.*)$", told.stderr, re.M), re.search(r"release (\d+)\.(\d+)", release.stdout)
    if top is None or version is None or version[1] != torch.version.cuda.split(".")[0]:
        return None
    return os.path.realpath(top[1]), (int(version[1]), int(version[2]))


def extension() -> dict:
    """Arguments for setup()."""
    toolkit = cuda_toolkit()
    if toolkit is not None:
        os.environ["CUDA_HOME"] = toolkit[0]
        # PTX of the newest serves what comes later. Blackwell needs CUDA 12.8.
        newest = "9.0;10.0+PTX" if toolkit[1] >= (12, 8) else "9.0+PTX"
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"8.0;{newest}")
    from torch.utils import cpp_extension  # which reads CUDA_HOME on import

    # The threads of torch itself, which on Linux are OpenMP's; elsewhere one thread runs the loops.
    threads = ["-fopenmp"] if sys.platform == "linux" else []
    make = cpp_extension.CppExtension if toolkit is None else cpp_extension.CUDAExtension
    module = make(
        "hypercontrast._C",
        SOURCES if toolkit is None else SOURCES + CUDA_SOURCES,
        depends=glob.glob("csrc/*.h"),
        define_macros=[] if toolkit is None else [("HYPERCONTRAST_CUDA", None)],
        extra_compile_args={
            "cxx": ["-O2", "-g0", "-std=c++20", "-fvisibility=hidden", *threads],
            "nvcc": ["-O3", "-std=c++17"],
        },
        extra_link_args=threads,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": optional(cpp_extension.BuildExtension)}}


def optional(build_extension: type) -> type:
    """A build that fails gives a pure Python install and says so, unless it was asked for by name."""

    class OptionalBuild(build_extension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if "build_ext" in sys.argv:
                    raise
                skip(f"the build failed: {error}")

    return OptionalBuild


def skip(reason: str) -> dict:
    print(f"hypercontrast: building without the C++ extension: {reason}", file=sys.stderr)
    return {}


reason = obstacle()
setup(**(extension() if reason is None else skip(reason)))
