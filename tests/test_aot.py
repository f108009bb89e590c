"""Every shipped kernel configuration compiles for sm_80, sm_90 and sm_100 without spills, within shared memory.

No GPU is needed. Triton must be imported without its interpreter, so each test runs this file as a script in a process of its
own, which compiles on as many processes as there are cores and prints one line of JSON for each configuration.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from bench.occupancy import MULTIPROCESSORS

ROOT = Path(__file__).resolve().parents[1]
KERNELS = (
    "lse_fwd", "lse_fwd_tile", "lse_bwd", "lse_bwd_tile", "inverse_norms",
    "pair_fwd", "pair_triangle", "pair_bwd", "pair_bwd_tile", "norms", "class_positives",
    "pair_fwd_fixed", "pair_triangle_fixed", "pair_bwd_fixed", "prepare", "prepare_side", "join", "classes", "pair_loss",
    "columns", "finish", "combine", "range", "class_sums", "segment_sum", "loss", "totals",
)  # fmt: skip
HALF_PRODUCTS = re.compile(
    "^(lse|pair)_(fwd|fwd_tile|triangle|bwd|bwd_tile|fwd_fixed|triangle_fixed|bwd_fixed)-(bf16|fp16)-(?!.*kept=True)"
)


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_hardest_configurations_compile_cleanly(architecture):
    """The tile shapes of every table, each with the flags that cost most, aligned and unaligned in turn."""
    reports = compile_in_subprocess("hardest", "all", architecture)
    check_all(reports)
    assert {report["name"].split("-")[0] for report in reports} == set(KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "architecture"), list(itertools.product(KERNELS, [80, 90, 100])))
def test_every_configuration_compiles_cleanly(kernel, architecture):
    check_all(compile_in_subprocess("every", kernel, architecture))


def test_sizes_of_one_are_constants():
    """Triton makes a constant of an integer 1, which has no `to` and no type: of each size in turn, and of all."""
    reports = compile_in_subprocess("ones", "all", 90)
    assert {report["name"].split("-")[0] for report in reports} == set(KERNELS)
    faults = [
        f"{report['name']}, {', '.join(report['ones'])}: {report['fault']}" for report in reports if report["fault"]
    ]
    assert not faults, "\n".join(faults)


def check_all(reports: list[dict]) -> None:
    assert reports
    faults = [f"{report['name']}: {fault}" for report in reports for fault in faults_of(report)]
    assert not faults, "\n".join(faults)


def faults_of(report: dict) -> list[str]:
    faults = []
    if report["stack"] or report["spills"]:
        faults.append(f"{report['stack']} bytes of stack, {report['spills']} spills")
    if report["shared"] > MULTIPROCESSORS[report["architecture"]].shared_a_program:
        faults.append(f"{report['shared']} bytes of shared memory")
    if report["architecture"] == 90 and HALF_PRODUCTS.match(report["name"]) and not report["wgmma"]:
        faults.append("no wgmma")
    return faults


def compile_in_subprocess(selection: str, kernel: str, architecture: int) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, selection, kernel, str(architecture)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


# ---- from here on: the script


def select(selection: str, kernel: str, architecture: int) -> list[tuple[str, int, bool]]:
    """(name of the configuration, architecture, aligned) to compile."""
    from hypercontrast.kernels.aot import aot_configurations

    configurations = [c for c in aot_configurations() if architecture in c.architectures]
    if selection == "every":
        names = [c.name for c in configurations if c.name.split("-")[0] == kernel]
    elif selection == "ones":
        names = extremes(configurations)
    else:
        names = hardest(configurations)
    # Aligned and unaligned in turn: neighbours in the list differ in one flag only.
    return [(name, architecture, position % 2 == 0) for position, name in enumerate(names)]


def hardest(configurations: list) -> list[str]:
    """Of each kernel, operand type and tile shape the one with most flags set."""
    chosen = {}
    for c in configurations:
        # Of the half types, fp16 does all that bf16 does and scales its range besides.
        if "bf16" not in c.name:
            blocks = tuple(value for key, value in c.constexprs.items() if key.startswith("BLOCK_"))
            group = (
                c.kernel,
                c.signature.get("a_ptr"),
                blocks,
                c.options["num_warps"],
                c.constexprs.get("A_IS_CLASSES"),
                c.constexprs.get("HAS_MASK"),
            )
            chosen[group] = max(chosen.get(group, c), c, key=lambda c: sum(v is True for v in c.constexprs.values()))
    return [c.name for c in chosen.values()]


def extremes(configurations: list) -> list[str]:
    """Of each kernel, with and without partial results to sum or absent classes, those with fewest and most flags."""
    groups: dict = {}
    for c in sorted(configurations, key=lambda c: sum(v is True for v in c.constexprs.values())):
        group = c.kernel, c.constexprs.get("BLOCK_S") == 1, c.constexprs.get("COMPACT")
        groups.setdefault(group, []).append(c.name)
    return list(dict.fromkeys(name for names in groups.values() for name in (names[0], names[-1])))


@functools.cache
def configurations_by_name() -> dict:
    """Once a process: there are thousands of them."""
    from hypercontrast.kernels.aot import aot_configurations

    return {c.name: c for c in aot_configurations()}


def compile_one(job: tuple[str, int, bool]) -> dict:
    name, architecture, aligned = job
    compiled = configurations_by_name()[name].compiled(architecture, aligned)
    return {
        "name": f"{name}-{'aligned' if aligned else 'unaligned'}-sm_{architecture}",
        "architecture": architecture,
        **asdict(compiled),
    }


def lower_one(job: tuple[str, int, bool]) -> list[dict]:
    configuration = configurations_by_name()[job[0]]
    sizes = configuration.sizes
    reports = []
    for ones in [[], *([size] for size in sizes), sizes]:
        try:
            configuration.lower(ones)
            fault = ""
        except Exception as error:  # a compiler may fail in any way
            fault = f"{type(error).__name__}: {error}"
        reports.append({"name": configuration.name, "ones": ones, "fault": fault})
    return reports


def compile_job(job: tuple[str, int, bool]) -> list[dict]:
    return [compile_one(job)]


if __name__ == "__main__":
    jobs = select(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        for reports in pool.map(lower_one if sys.argv[1] == "ones" else compile_job, jobs, chunksize=4):
            for report in reports:
                print(json.dumps(report), flush=True)
