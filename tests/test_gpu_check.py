"""What `make gpu-check` promises and can be seen without a GPU: the sanitizer meets every kernel, time limits, failures."""

import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("triton")

from test_kernels import record_launches

from bench import gpu_check
from hypercontrast.kernels import _launch, aot, prototype_backward


def test_the_sanitizer_meets_every_kernel(monkeypatch):
    """In name: without a GPU the launches are only counted, with types as they are on one."""
    kernels = {getattr(module, name).fn.__name__ for module, name in aot.kernels()}
    monkeypatch.setattr(prototype_backward, "mm_fp32", lambda a, b, into=None: torch.empty(len(a), b.shape[1]))
    monkeypatch.setattr(_launch, "kernel_dtype", lambda x: x.dtype)
    with record_launches(monkeypatch) as launched:
        for call in gpu_check.every_kernel():
            call()
    assert {name for name, _ in launched} == kernels


def test_a_stage_past_its_seconds_is_ended_with_all_it_started(monkeypatch, tmp_path):
    monkeypatch.setitem(gpu_check.STAGES, "indices", gpu_check.Stage(lambda *_: True, 1))
    program = f"import subprocess, time; subprocess.Popen(['sleep', '60.{time.time_ns()}']); time.sleep(60)"
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **options: popen([sys.executable, "-c", program], **options)
    )
    start = time.perf_counter()
    assert gpu_check.verdict_of("indices", tmp_path, rehearse=True) == "FAILED: cut off after 1 s"
    assert time.perf_counter() - start < 30
    monkeypatch.undo()
    time.sleep(0.2)
    listing = subprocess.run(["ps", "-eo", "stat,args"], capture_output=True, text=True, check=True).stdout
    sleeper = program.split("'")[3]
    assert not [line for line in listing.splitlines() if sleeper in line and not line.startswith("Z")]


def test_how_a_stage_ended(monkeypatch, tmp_path):
    for status, verdict in ((True, 0), (False, 1), (None, 3)):
        monkeypatch.setitem(gpu_check.STAGES, "indices", gpu_check.Stage(lambda *_, status=status: status, 1))
        assert gpu_check.inside("indices", tmp_path, rehearse=False) == verdict


def test_failures_are_told_when_they_happen(tmp_path, capsys):
    test = tmp_path / "test_slow.py"
    test.write_text("import time\n\ndef test_wrong():\n    assert 1 == 2\n\ndef test_long():\n    time.sleep(60)\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        "/dev/null",
        "--rootdir",
        str(tmp_path),
        "-p",
        "bench.failures",
    ]
    process = subprocess.Popen(
        [*command, "-p", "no:cacheprovider", str(test)], cwd=gpu_check.ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        told = []
        while not any(line.startswith("E ") for line in told):
            told.append(process.stdout.readline())
            assert told[-1], "ended without telling"
    finally:
        process.kill()
        process.wait()
    assert any(line.startswith("FAILURE ") and "test_wrong in call" in line for line in told)


def test_what_a_process_says_goes_to_its_log(tmp_path, capsys):
    program = "print('..'); print('FAILURE x'); print('E  1 == 2'); print('1 failed'); raise SystemExit(1)"
    log = tmp_path / "log"
    assert gpu_check.run([sys.executable, "-c", program], log, shown=("FAILURE ", "E  ")) == 1
    assert log.read_text() == "..\nFAILURE x\nE  1 == 2\n1 failed\n"
    assert capsys.readouterr().out == "    FAILURE x\n    E  1 == 2\n    1 failed\n"


def test_repeats_that_differ_are_counted():
    calls = []

    def run():
        calls.append(1)
        return torch.tensor(0.0), torch.tensor([1.0, torch.nan, -0.0 if len(calls) == 3 else 0.0])

    assert gpu_check.different_repeats(run, 5) == 1
