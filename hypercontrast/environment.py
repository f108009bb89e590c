"""What a run is made with: versions, machine and commit, as environment.json in its folder keeps them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from hypercontrast import __version__

PACKAGES = ("torchvision", "triton", "timm", "numpy")  # whose versions may change a run's numbers, where installed


def environment(device: torch.device, ranks: int) -> dict[str, str]:
    """Names and values, in the order to show them in."""
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    made_with = {
        "hypercontrast": " ".join([__version__, *_commit()]),
        "torch": torch.__version__,
        **{name: found for name in PACKAGES if (found := version(name))},
        "Python": platform.python_version(),
        "machine": machine,
        "device": f"{ranks} × {accelerator}" if ranks > 1 else accelerator,
    }
    if device.type == "cpu":
        made_with["threads"] = str(torch.get_num_threads())
    return made_with


def version(package: str) -> str:
    """Of an installed package; empty where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> list[str]:
    """Of the checkout that this package runs from; nothing where it is installed."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():  # a repository further up would be another one's
        return []
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [f"(commit {done.stdout.strip()})"]
