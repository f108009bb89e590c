"""What `make gpu-check` promises and can be seen without a GPU: the sanitizer meets every kernel, time limits, failures."""

import re
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from test_kernels import record_launches

import hypercontrast as hc
from bench import forms, gpu_check, matrix, record, step
from hypercontrast import _checks
from hypercontrast.kernels import _launch, aot, prototype_backward


def test_the_sanitizer_meets_every_kernel(monkeypatch):
    """In name: without a GPU the launches are only counted, with types as they are on one."""
    kernels = {getattr(module, name).fn.__name__ for module, name in aot.kernels()}
    monkeypatch.setattr(prototype_backward, "mm_fp32", lambda a, b, into=None: torch.empty(len(a), b.shape[1]))
    monkeypatch.setattr(_launch, "kernel_dtype", lambda x: x.dtype)
    monkeypatch.setattr(_checks, "can_be_read", lambda x: False)  # nor are results, which nothing has written here
    with record_launches(monkeypatch) as launched:
        for call in gpu_check.every_kernel():
            call()
    assert {name for name, _ in launched} == kernels


def run_as_stage(monkeypatch, program):
    popen = subprocess.Popen

    def instead(command, **options):
        return popen([sys.executable, "-c", program] if command[0] == sys.executable else command, **options)

    monkeypatch.setattr(subprocess, "Popen", instead)


def test_a_stage_past_its_seconds_is_ended_with_all_it_started(monkeypatch, tmp_path):
    monkeypatch.setitem(gpu_check.STAGES, "indices", gpu_check.Stage(lambda *_: True, 1))
    program = f"import subprocess, time; subprocess.Popen(['sleep', '60.{time.time_ns()}']); time.sleep(60)"
    run_as_stage(monkeypatch, f"print('begun'); {program}")
    start = time.perf_counter()
    assert gpu_check.verdict_of("indices", tmp_path, rehearse=True) == "FAILED: cut off after 1 s"
    assert time.perf_counter() - start < 30
    assert (tmp_path / "indices.txt").read_text() == "begun\n"
    monkeypatch.undo()
    time.sleep(0.2)
    listing = subprocess.run(["ps", "-eo", "stat,args"], capture_output=True, text=True, check=True).stdout
    sleeper = program.split("'")[3]
    assert not [line for line in listing.splitlines() if sleeper in line and not line.startswith("Z")]


def test_how_a_stage_ended(monkeypatch, tmp_path, capsys):
    for outcome, status in ((True, 0), (False, 1), ("needs a camera", 3)):
        monkeypatch.setitem(gpu_check.STAGES, "indices", gpu_check.Stage(lambda *_, outcome=outcome: outcome, 1))
        assert gpu_check.inside("indices", tmp_path, rehearse=False) == status
    assert capsys.readouterr().out == "    left out: needs a camera\n"


@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        ("print('all well')", "passed"),
        ("raise ValueError", "FAILED"),
        ("print('    left out: needs a camera'); raise SystemExit(3)", "left out: needs a camera"),
        ("raise SystemExit(3)", "FAILED: ended with 3"),
        ("import os; os.abort()", "FAILED: ended with -6"),
    ],
)
def test_verdicts(program, verdict, monkeypatch, tmp_path):
    run_as_stage(monkeypatch, f"import sys; print('told', file=sys.stderr); {program}")
    assert gpu_check.verdict_of("indices", tmp_path, rehearse=True) == verdict
    assert (tmp_path / "indices.txt").read_text().startswith("told\n")


def test_the_folder_has_every_verdict(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    verdicts = {"indices": "passed", "matrix": "FAILED", "sanitizer": "left out: needs a GPU"}
    monkeypatch.setattr(gpu_check, "verdict_of", lambda name, *_: verdicts[name])
    run = ["--rehearse", "--output", str(tmp_path), "--stages"]
    assert gpu_check.main([*run, "indices", "sanitizer"]) == 0
    assert gpu_check.main([*run, "matrix", "indices"]) == 1
    lines = (tmp_path / "verdicts.txt").read_text().splitlines()
    names = ("indices", "sanitizer", "matrix", "indices")
    assert lines == [f"{name}: {verdicts[name]} (0 s)" for name in names]


def test_a_folder_that_cannot_be_written(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu_check.main(["--rehearse", "--output", __file__]) == 2
    assert capsys.readouterr().err.startswith("error: --output must be where files can be written: ")


def test_the_limits_fit_ten_minutes():
    assert sum(stage.seconds for stage in gpu_check.STAGES.values()) <= 600


def test_a_machine_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "commit: unknown" in gpu_check.environment().splitlines()


@pytest.mark.parametrize(
    ("absent", "reason"),
    [(["yaml"], "needs PyYAML"), (["yaml", "torchvision"], "needs PyYAML and torchvision")],
)
def test_training_is_left_out_without_what_it_needs(absent, reason, monkeypatch, tmp_path):
    for module in absent:
        monkeypatch.setitem(sys.modules, module, None)
    assert gpu_check.training(tmp_path, rehearse=False) == reason


def test_the_driver_is_left_out_without_safetensors(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert gpu_check.driver(tmp_path, rehearse=True) == "needs safetensors"


@pytest.mark.parametrize("fault", ["", "accuracy", "report"])
def test_the_driver_runs_whole(fault, monkeypatch, tmp_path, capsys):
    pytest.importorskip("torchvision")
    if fault == "accuracy":
        monkeypatch.setattr("hypercontrast.evaluate._accuracy", lambda *_: float("nan"))
    elif fault == "report":
        monkeypatch.setattr("hypercontrast.train.write_report", lambda *_: None)
    assert gpu_check.driver(tmp_path, rehearse=True) == (not fault)
    assert re.findall(r"(\w+): loss \d\.\d+, .* linear-probe ", capsys.readouterr().out) == ["nonl", "scl"]


def test_a_training_row_is_kept_when_the_next_fails(monkeypatch, tmp_path):
    rows = iter([{"recipe": "one", "epoch_s": 1.5}, {"recipe": "two", "epoch_s": 2.5}])
    monkeypatch.setattr(step, "missing", str)
    monkeypatch.setattr(step, "measure", lambda *_, **__: SimpleNamespace(flat=partial(next, rows)))
    with pytest.raises(StopIteration):
        gpu_check.training(tmp_path, rehearse=False)
    assert (tmp_path / "training.csv").read_text() == "recipe,epoch_s\none,1.5\ntwo,2.5\n"


def test_processes_side_by_side_make_every_call_once(monkeypatch):
    def here(command, **_):
        status = gpu_check.main(command[3:])
        return SimpleNamespace(wait=lambda: status)

    monkeypatch.setattr(subprocess, "Popen", here)
    called = []
    calls = [partial(called.append, i) for i in range(5)]
    monkeypatch.setitem(gpu_check.CALLS, "sanitizer", lambda rehearse: calls)
    assert gpu_check.side_by_side("sanitizer", rehearse=False, parts=3)
    assert sorted(called) == [0, 1, 2, 3, 4]
    for place in (0, 5):  # the first and the last of a process's own
        some = [*calls[:place], lambda: False, *calls[place:]]
        monkeypatch.setitem(gpu_check.CALLS, "sanitizer", lambda rehearse, some=some: some)
        assert not gpu_check.side_by_side("sanitizer", rehearse=False, parts=3)


@pytest.mark.parametrize("dirty", [(), ("memcheck",), ("initcheck",)])
def test_every_check_of_the_sanitizer_counts(dirty, monkeypatch, tmp_path, capsys):
    def tool(command, **_):
        return SimpleNamespace(wait=lambda: 9 if command[1].removeprefix("--tool=") in dirty else 0)

    monkeypatch.setattr(gpu_check, "side_by_side", lambda *_: True)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: sys.executable)
    monkeypatch.setattr(subprocess, "Popen", tool)
    assert gpu_check.sanitizer(tmp_path, rehearse=False) == (not dirty)
    told = capsys.readouterr().out
    for check in ("memcheck", "racecheck", "initcheck"):
        assert f"{check}: {'see' if check in dirty else 'clean'}" in told


def test_determinism_compiles_side_by_side_before_it_repeats(monkeypatch, tmp_path):
    done = []
    monkeypatch.setattr(gpu_check, "side_by_side", lambda name, rehearse: done.append(name) or len(done) == 1)
    monkeypatch.setattr(gpu_check, "different_repeats", lambda *_: done.append("repeats") or 0)
    assert gpu_check.determinism(tmp_path, rehearse=True)
    assert done == ["determinism"] + ["repeats"] * 6
    assert not gpu_check.determinism(tmp_path, rehearse=True)
    assert done[7:] == ["determinism"]


@pytest.mark.parametrize("place", [0, 2])
def test_one_case_that_differs_is_enough(place, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "side_by_side", lambda *_: True)
    monkeypatch.setattr(gpu_check, "repeated", lambda rehearse: ((str(i), i) for i in range(3)))
    monkeypatch.setattr(gpu_check, "different_repeats", lambda step, repeats: int(step == place))
    assert not gpu_check.determinism(tmp_path, rehearse=True)


# Indices


@pytest.fixture
def memory_budget():
    budget = hc.memory_budget()
    yield
    hc.set_memory_budget(budget)


@pytest.mark.usefixtures("memory_budget")
@pytest.mark.parametrize("op", ["ntce", "supcon"])
def test_a_wrong_row_is_told_from_rounding(op, monkeypatch):
    """The last one alone, of the gradient of either; a NaN is wrong too."""
    run, size = forms.step, (op, 200, 8, 24, torch.float16)
    assert gpu_check.equals_float64(*size)
    outputs = []
    monkeypatch.setattr(forms, "step", lambda *args: outputs or outputs.extend(run(*args)) or outputs)
    assert gpu_check.equals_float64(*size)
    for gradient in outputs[1:]:
        for value in (0, torch.nan):
            right = gradient[-1].clone()
            gradient[-1] = value
            assert not gpu_check.equals_float64(*size)
            gradient[-1] = right
    assert gpu_check.equals_float64(*size)
    outputs[0] *= 1.01
    assert not gpu_check.equals_float64(*size)


@pytest.mark.usefixtures("memory_budget")
def test_the_anchor_of_few_samples_counts_by_itself(monkeypatch):
    """Its gradient is less than a hundredth of all of them together."""
    run, size = forms.step, ("ntce", 200, 3, 24, torch.float16)
    outputs = []
    monkeypatch.setattr(forms, "step", lambda *args: outputs or outputs.extend(run(*args)) or outputs)
    assert gpu_check.equals_float64(*size)
    outputs[2][0] = 0
    assert not gpu_check.equals_float64(*size)


@pytest.mark.usefixtures("memory_budget")
@pytest.mark.parametrize("op", ["ntce", "supcon"])
def test_a_sum_over_wrong_samples_is_told_from_rounding(op, monkeypatch):
    """The last three of thousands, for which the first ones are read, as by an index that wraps: in the anchors' gradient
    alone.
    """
    run, size = forms.step, (op, 2000, 8, 24, torch.float16)

    def wrapped(loss, leaves, y):
        z, w = leaves
        other = torch.cat([z[:-3], z[:3]]).detach().requires_grad_()
        return [*run(loss, leaves, y)[:2], run(loss, (other, w), y)[2]]

    assert gpu_check.equals_float64(*size)
    monkeypatch.setattr(forms, "step", wrapped)
    assert not gpu_check.equals_float64(*size)


@pytest.mark.usefixtures("memory_budget")
def test_a_class_that_weighs_nothing_where_exponentials_are_kept(monkeypatch):
    """Its gradient is zero, and nothing else is right."""
    monkeypatch.setattr(_launch, "is_narrow", lambda tables, x: False)
    monkeypatch.setattr(_launch, "KEEP_WIDTH", 1)
    monkeypatch.setattr(_launch, "KEEP_FLOP", 0)
    run, size = forms.step, ("ntce", 200, 24, 16, torch.float16)
    with record_launches(monkeypatch) as launched:  # which runs none
        gpu_check.equals_float64(*size)
    assert [dict(options)["KEPT"] for name, options in launched if name == "_lse_bwd_tile_kernel"] == [True]
    outputs = []
    monkeypatch.setattr(forms, "step", lambda *args: outputs or outputs.extend(run(*args)) or outputs)
    assert gpu_check.equals_float64(*size)
    assert not outputs[2][1].any()
    outputs[2][1, 3] = 1e-6
    assert not gpu_check.equals_float64(*size)


@pytest.mark.usefixtures("memory_budget")
@pytest.mark.parametrize("case", [("normface", 40, 40), ("normface", 40, 60), ("supcon", 40, 40)])
def test_a_wrong_row_of_copies_is_told(case, monkeypatch):
    """The last one of either gradient, or of either side as the other's sums read it."""
    monkeypatch.setattr(gpu_check, "COPIES_OF", 11)
    monkeypatch.setattr(gpu_check, "ABSENT_COPIES_OF", 7)
    run, size = forms.step, (*case, 24, torch.float16)
    assert gpu_check.copies_equal_float64(*size)
    outputs = []
    monkeypatch.setattr(forms, "step", lambda *args: outputs or outputs.extend(run(*args)) or outputs)
    assert gpu_check.copies_equal_float64(*size)
    for gradient in outputs[1:]:
        for wrong in (torch.zeros(24), torch.full((24,), torch.nan), gradient[-20].clone()):
            right = gradient[-1].clone()
            gradient[-1] = wrong
            assert not gpu_check.copies_equal_float64(*size)
            gradient[-1] = right
    assert gpu_check.copies_equal_float64(*size)
    for side in range(len(outputs) - 1):

        def wrapped(loss, leaves, y, side=side):
            """The last rows read as the first ones."""
            read = [x.detach().clone() for x in leaves]
            read[side][-1:] = read[side][:1]
            return run(loss, [x.requires_grad_() for x in read], y)

        def of_the_other(loss, leaves, y, side=side, wrapped=wrapped):
            right, wrong = run(loss, leaves, y), wrapped(loss, leaves, y)
            return [right[0], *(right[i] if i == 1 + side else wrong[i] for i in range(1, len(right)))]

        monkeypatch.setattr(forms, "step", wrapped if case[0] == "supcon" else of_the_other)
        assert not gpu_check.copies_equal_float64(*size)


def test_copies_differ_from_rows_some_power_of_two_away():
    for prime in (gpu_check.COPIES_OF, gpu_check.ABSENT_COPIES_OF):
        assert all(2**shift % prime for shift in range(32))


def test_a_row_shows_in_a_block_of_bfloat16():
    assert gpu_check.INDEXED_BLOCK**-0.5 > gpu_check.INDEXED_ERROR > torch.finfo(torch.bfloat16).eps


@pytest.mark.usefixtures("memory_budget")
def test_indices_meet_every_kernel_of_both_passes(monkeypatch):
    """Those of narrow and wide operands at the rehearsal's sizes, where the launches are only counted."""
    monkeypatch.setattr(prototype_backward, "mm_fp32", lambda a, b, into=None: torch.zeros(len(a), b.shape[1]))
    monkeypatch.setattr(_launch, "kernel_dtype", lambda x: x.dtype)
    with record_launches(monkeypatch) as launched:
        for call in gpu_check.indexed(rehearse=True):
            call()
    names = {name for name, _ in launched}
    assert names >= {"_lse_fwd_kernel", "_lse_fwd_tile_kernel", "_lse_bwd_kernel", "_lse_bwd_tile_kernel"}
    assert names >= {"_rectangle_fixed_kernel", "_bwd_fixed_kernel", "_pair_fwd_kernel", "_pair_bwd_tile_kernel"}


def test_indices_pass_two_to_the_31(monkeypatch):
    """Of the samples, in narrow and wide kernels; of kept exponentials; of both sides of a product; of the classes."""
    monkeypatch.setattr(_launch, "kernel_dtype", lambda x: x.dtype)
    past = set()
    for call in gpu_check.indexed(rehearse=False):
        op, n, *k, d, dtype = call.args
        z, w = (torch.empty(rows, d, dtype=dtype, device="meta") for rows in (n, *k))
        narrow = _launch.is_narrow(_launch.BACKWARD_NARROW, z)
        kept, width = _launch.kept_shape(
            z, w, counts=None, temperature=None, inv_temperature=1 / gpu_check.TAU, rows=True, cols=False,
            normalize=True, keep_bytes=2 * len(w) * (n + 64) if call.func is gpu_check.equals_float64 and len(w) > d else 0,
        )  # fmt: skip
        sizes = {"samples": n * d, "classes": len(w) * d, "kept": kept * width}
        past.add((op, narrow, *(name for name, size in sizes.items() if size > 2**31)))
    assert past == {
        ("ntce", True, "samples"),
        ("ntce", False, "samples"),
        ("ntce", False, "kept"),
        ("supcon", True, "samples"),
        ("supcon", False, "samples"),
        ("normface", False, "samples", "classes"),
        ("supcon", False, "samples", "classes"),
        ("normface", True, "classes"),
    }


def test_failures_are_told_when_they_happen(tmp_path):
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


@pytest.mark.parametrize(("statuses", "passes"), [((0, 5, 0), True), ((5, 5, 5), False), ((0, 1, 5), False)])
def test_shares_of_the_tests(statuses, passes, monkeypatch, tmp_path):
    """One without any is nobody's fault, none at all is."""
    monkeypatch.setattr(gpu_check, "WORKERS", 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_check, "run", lambda command, *_: statuses[int(command[-1].partition("/")[0])])
    assert gpu_check.run_tests([], [], tmp_path / "log") is passes


@pytest.mark.parametrize(
    ("form", "status", "repeats", "passes"),
    [
        ("ours", "ok", True, True),
        ("ours", "ok", False, False),
        ("ours", "wrong", True, False),
        ("eager", "wrong", False, True),
    ],
)
def test_ours_must_be_right_and_repeat_in_the_matrix(form, status, repeats, passes, monkeypatch, tmp_path):
    found = matrix.row(record.Case("ntce", 8, 4, 2), form, "cpu", {"status": status, "repeats": repeats})
    monkeypatch.setattr(matrix, "measure_all", lambda *_, **__: matrix.Outcome([found], []))
    monkeypatch.setattr(gpu_check.plot, "draw_beside", lambda file: [])
    assert gpu_check.measured(tmp_path, rehearse=True) is passes


def test_repeats_that_differ_are_counted():
    calls = []

    def run():
        calls.append(1)
        return torch.tensor(0.0), torch.tensor([1.0, torch.nan, -0.0 if len(calls) == 3 else 0.0])

    assert gpu_check.different_repeats(run, 5) == 1


@pytest.mark.parametrize("passes", [True, False])
def test_tests_run_side_by_side_without_xdist(passes, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # which take seconds
    monkeypatch.setattr(gpu_check, "WORKERS", 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    test = tmp_path / "test_few.py"
    bodies = {"other": "assert False", "first": "pass", "second": f"assert {passes}"}
    test.write_text("".join(f"def test_{name}():\n    {body}\n\n" for name, body in bodies.items()))
    selection = ["-c", "/dev/null", "--rootdir", str(tmp_path), "-k", "not test_other"]
    assert gpu_check.run_tests([str(test)], selection, tmp_path / "x.log") is passes
    logs = [(tmp_path / f"x-{part}.log").read_text() for part in range(3)]
    assert ["1 passed" in log for log in logs] == [True, passes, False]
    assert ("FAILURE " in capsys.readouterr().out) is not passes
