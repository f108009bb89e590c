"""Importing the package needs torch and numpy alone."""

import subprocess
import sys

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"triton", "torchvision", "matplotlib", "rich", "tyro", "safetensors", "yaml", "mlxtend"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import torch, hypercontrast as hc
loss = hc.nonl_loss(torch.randn(4, 3), torch.randn(2, 3), torch.tensor([0, 1, 0, 1]))
assert torch.isfinite(loss)
try:
    hc.ntce_loss(torch.randn(1, 3), torch.randn(2, 3), torch.tensor([0]), backend="triton")
except ValueError as error:
    assert "needs the triton package" in str(error), error
else:
    raise AssertionError("backend='triton' ran without triton")
print("fine")
"""


def test_import_without_any_extra():
    run = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=120)
    assert run.stdout == "fine\n", run.stderr


def test_import_loads_no_extra():
    code = (
        "import sys, hypercontrast; print(sorted({'triton', 'torchvision', 'matplotlib', 'rich'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout == "[]\n", run.stderr + run.stdout
