"""Ranks that disagree, refuse, die or stop: one sentence on every rank that is left, soon, and never a hang."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from runs import as_from_a_prompt
from torch import nn

import hypercontrast as hc
from hypercontrast import buffer as buffer_module
from hypercontrast import metrics
from hypercontrast._agreement import LostRankError, agree, connected

TIMEOUT = 3.0  # seconds
GRACE = 5.0
K, D = 6, 4


# ---- ranks that disagree


def batch(n=5, d=D, dtype=torch.float32, k=K, **_):
    g = torch.Generator().manual_seed(n)
    features = torch.randn(n, d, generator=g).to(dtype).requires_grad_()
    prototypes = torch.randn(k, d, generator=g).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return features, prototypes.requires_grad_(), torch.randint(0, k, (n,), generator=g)


def prototype_loss(name, features=None, options=None, **shape):
    z, w, y = batch(**shape)
    loss = getattr(hc, name)(z if features is None else features(z), w, y, **(options or {}))
    loss.sum().backward()


def supcon(features=None, options=None, **shape):
    z, _, y = batch(**shape)
    hc.supcon_loss(z if features is None else features(z), y, **(options or {})).sum().backward()


def supcon_by_buffer(features=None, d=D, **shape):
    z, _, y = batch(d=d, **shape)
    hc.supcon_loss(z if features is None else features(z), y, queue=hc.NegativeBuffer(D, 8)).backward()


def gather(features=None, **shape):
    z, _, _ = batch(**shape)
    hc.gather_with_grad(z if features is None else features(z)).sum().backward()


def buffer(features=None, arguments=None, **shape):
    z, _, y = batch(**shape)
    made = hc.NegativeBuffer(**({"dim": D, "batch": 8} | (arguments or {})))
    made.gather(z if features is None else features(z), y)


def class_means(k=K, d=D, options=None, **_):
    hc.ClassMeans(k, d, **(options or {})).all_reduce()


def collapse(k=K, d=D, **_):
    hc.NeuralCollapse(k, d).all_reduce()


def poisoned(value):
    def poison(z):
        z = z.detach().clone()
        z[1, 2] = value
        return z.requires_grad_()

    return poison


def scalar(z):
    return z.sum()


def detached(z):
    return z.detach()


CALLS = {
    "nonl": partial(prototype_loss, "nonl_loss"),
    "ntce": partial(prototype_loss, "ntce_loss"),
    "normface": partial(prototype_loss, "normface_loss"),
    "supcon": supcon,
    "supcon by buffer": supcon_by_buffer,
    "gather": gather,
    "buffer": buffer,
    "class means": class_means,
    "collapse": collapse,
}
PROTOTYPE = ("nonl", "ntce", "normface")
LOSSES = (*PROTOTYPE, "supcon")
# (what all ranks call, what sets one rank apart): other arguments, or another call
CASES: list[tuple[str, str | dict]] = [
    *[(call, {"d": D + 1}) for call in (*LOSSES, "supcon by buffer", "gather", "buffer", "class means", "collapse")],
    *[(call, {"dtype": dtype}) for call in (*LOSSES, "gather") for dtype in (torch.bfloat16, torch.float64)],
    *[(call, {"k": K + 1}) for call in (*PROTOTYPE, "class means", "collapse")],
    *[(call, {"options": {"reduction": reduction}}) for call in LOSSES for reduction in ("sum", "none")],
    *[(call, {"options": {"normalize": False}}) for call in LOSSES],
    *[(call, {"options": {"temperature": 0.001}}) for call in PROTOTYPE],  # needs another collective
    *[(call, {"options": {"temperature": 0.2}}) for call in LOSSES],
    ("supcon", {"options": {"base_temperature": 0.07}}),
    ("class means", {"options": {"mode": "ema"}}),
    ("nonl", {"options": {"anchor": "both"}}),
    *[("nonl", {"options": options}) for options in ({"anchor": "class"}, {"empty": "none"})],  # there are no such
    ("nonl", {"options": {"anchor": "sample", "queue": (torch.zeros(1, D), torch.zeros(1, dtype=torch.int64))}}),
    ("supcon", {"options": {"variant": "in"}}),
    *[("buffer", {"arguments": {name: value}}) for name, value in (("dim", 5), ("batch", 9), ("queue", 2))],
    ("buffer", {"arguments": {"dtype": torch.float16}}),
    *[(call, {"features": detached}) for call in ("supcon", "gather")],
    *[(call, {"features": poisoned(value)}) for call in (*LOSSES, "buffer") for value in (torch.nan, torch.inf)],
    *[(call, {"features": scalar}) for call in (*LOSSES, "gather", "buffer")],
    *[(call, {"options": {"temperature": -1.0}}) for call in LOSSES],
    *[(call, other) for call in CALLS for other in CALLS if call != other],
]


def disagree(rank, world, chosen):
    """What each case came to on this rank. After a case every rank makes one call more, which must work."""
    said = []
    for number in chosen:
        call, different = CASES[number]
        odd = rank == number % world
        try:
            if odd and isinstance(different, str):
                CALLS[different]()
            else:
                CALLS[call](**(different if odd else {}))
        except (ValueError, TypeError) as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            said.append("")
        n = torch.full((1,), float(rank), requires_grad=True)
        assert hc.gather_with_grad(n).tolist() == list(range(world)), f"out of step after {CASES[number]}"
    return said


@pytest.mark.parametrize("world", [2, 3, 4])
def test_disagreement_is_an_error_on_every_rank(world, tmp_path, figure):
    said = ranks.spawn(disagree, world, tmp_path, list(range(len(CASES))), timeout=20)
    for case, answers in zip(CASES, zip(*said, strict=True), strict=True):
        assert all(answers), f"{case}: {answers}"
    figure("R8", f"{len(CASES)} disagreements of {world} ranks: a Python error on every rank, still in step after each")


# ---- what not every rank can see by itself


def supcon_through(queue, group="auto", **options):
    z, _, y = batch()
    hc.supcon_loss(z, y, queue=queue, group=group, **options).backward()


def gather_twice(rank, group):
    """The second gather begins before rank 0 has waited for the first."""
    z, _, y = batch()
    made = hc.NegativeBuffer(D, 8, group=group)
    first = made.gather_async(z, y)
    if rank:
        first.wait()
    try:
        made.gather(z, y)
    finally:
        if not rank:
            first.wait()


def without_negatives(rank, **options):
    """All samples are rank 0's, and of one class."""
    z, w, y = batch(n=5 * (rank == 0), k=1)
    hc.nonl_loss(z, w, y, empty="error", **options).sum().backward()


def dcl_of_frozen_features(rank):
    z = torch.ones(3, 2, D, requires_grad=rank == 0)
    hc.dcl_loss(z, temperature=torch.ones((), requires_grad=True)).backward()


LONG = "x" * 150 + "ö" * 400  # more bytes than ranks tell each other, cut inside of a letter


def backward_of_another(rank, one, another):
    """Rank 0 asks for the gradient of one call, the others for that of another."""
    z, w, y = batch()
    losses = {
        "gather": hc.gather_with_grad(z).sum(),
        "supcon": hc.supcon_loss(z, y),
        "nonl": hc.nonl_loss(z, w, y, reduction="none").sum(),
    }
    losses[another if rank else one].backward()


UNSEEN = {  # what the ranks say, from the first on; two of three make calls over the pair
    "unit columns": ["queue must be a NegativeBuffer with normalize=False for normalize=False, got normalize=True"] * 3,
    "other columns": ["queue must be a NegativeBuffer over the loss's ranks [0, 1], got one over [0, 1, 2]"] * 2,
    "unwaited": ["gather must come after wait() of the gather under way"] * 3,
    "unwaited in a pair": ["gather must come after wait() of the gather under way"] * 2,
    "no negatives of samples": ["labels must hold at least two classes for a loss over negatives"] * 3,
    "no negatives, none": ["labels must hold at least two classes for a loss over negatives"] * 3,
    "frozen features": ["every rank must make the same call, got dcl_loss"] * 3,
    "no device": ["device must be one that torch knows, got 'bogus'"] * 3,
    "outside": ["", "", "group must have this rank as a member"],
    "a long word": [f"variant must be one of 'out', 'in', got '{LONG[:200]}"] * 3,
    "gather, supcon": ["got backward of gather_with_grad on rank 0 and backward of supcon_loss on rank 1"] * 3,
    "supcon, nonl": ["got backward of supcon_loss on rank 0 and backward of a prototype loss on rank 1"] * 3,
    "nonl, gather": ["got backward of a prototype loss on rank 0 and backward of gather_with_grad on rank 1"] * 3,
}


def unseen(rank, world):
    """What each case came to on this rank; after a case every rank makes one call more, which must work."""
    pair = dist.new_group([0, 1])
    unit = hc.NegativeBuffer(D, 8)
    calls = {
        "unit columns": lambda: supcon_through(unit, normalize=False),
        "other columns": lambda: rank < 2 and supcon_through(unit, pair),
        "unwaited": lambda: gather_twice(rank, "auto"),
        "unwaited in a pair": lambda: rank < 2 and gather_twice(rank, pair),
        "no negatives of samples": lambda: without_negatives(rank, anchor="sample"),
        "no negatives, none": lambda: without_negatives(rank, reduction="none"),
        "frozen features": lambda: dcl_of_frozen_features(rank),
        "no device": lambda: hc.NegativeBuffer(D, 8, device="cpu" if rank else "bogus"),
        "outside": lambda: prototype_loss("ntce_loss", options={"group": pair}),
        "a long word": lambda: supcon(options={"variant": "out" if rank else LONG}),
    }
    for pairing in ("gather, supcon", "supcon, nonl", "nonl, gather"):
        calls[pairing] = partial(backward_of_another, rank, *pairing.split(", "))
    said = {}
    for name in UNSEEN:
        said[name] = ""
        try:
            calls[name]()
        except (ValueError, TypeError, RuntimeError) as error:
            said[name] = str(error)
        assert hc.gather_with_grad(torch.ones(1)).tolist() == [1.0] * world, f"out of step after {name}: {said}"
    return said


def test_what_one_rank_sees_is_an_error_on_all(tmp_path):
    answers = ranks.spawn(unseen, 3, tmp_path, timeout=5)
    for name, expected in UNSEEN.items():
        for said, words in zip((of_rank[name] for of_rank in answers), expected, strict=False):
            assert words in said if words else not said, f"{name}: {said}"


# ---- ranks that die, stop or raise


def die(folder, how):
    (folder / "moment").touch()  # when it happened
    os.kill(os.getpid(), how)


def train_until_failure(rank, world, folder, how, victim, at_step, delay):
    """Steps over everything that exchanges data, until the victim fails, within or between two calls of step
    `at_step`."""
    # Starting takes as long as it takes; only the steps are given TIMEOUT.
    dist.barrier()
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    torch.manual_seed(0)
    encoder = nn.parallel.DistributedDataParallel(nn.Linear(D, D), process_group=group)
    prototypes = torch.randn(K, D)
    queue = hc.NegativeBuffer(D, 8, queue=16, group=group)
    means = hc.ClassMeans(K, D)
    optimizer = torch.optim.SGD(encoder.parameters(), 0.1)
    for step in range(10**6):
        features, _, labels = batch(n=5 + rank)
        if rank == victim and step == at_step:
            if how in (signal.SIGKILL, signal.SIGSTOP):
                threading.Timer(delay, die, (folder, how)).start()
            else:
                (folder / "moment").touch()
            if how == "raise":
                raise KeyError("something of the caller's own")
            if how == "sleep":
                time.sleep(1000)
            if how == "nan":
                features = poisoned(torch.nan)(features)
        with connected(f"step {step}"):
            z = encoder(features)  # DDP exchanges its buckets' order in the second forward
            loss = hc.nonl_loss(z, prototypes, labels, group=group, class_means=means)
            loss = loss + hc.supcon_loss(z, labels, queue=queue, group=group) + hc.supcon_loss(z, labels, group=group)
            loss = loss + hc.gather_with_grad(z, group).square().mean()
            loss.backward()
            queue.push()
            means.all_reduce(group)
        optimizer.step()
        optimizer.zero_grad()


LOST = re.compile(
    r"LostRankError: step \d+: rank \d of \d "
    rf"(lost the connection to another rank|had no answer from another rank for {TIMEOUT:g} s) "
    r"at its call \d+ to hypercontrast"
)


def fail_once(how, draw, folder):
    """Seconds from the failure to the last survivor's end. Every survivor must have said what happened."""
    world = draw.randint(2, 4)
    victim = draw.randrange(world)
    survivors = [rank for rank in range(world) if rank != victim]
    folder.mkdir()
    options = (folder, how, victim, draw.randint(0, 20), draw.uniform(0, 0.02))
    with ranks.Ranks(train_until_failure, world, folder, *options, timeout=60) as started:
        ended = started.join(60 + TIMEOUT + GRACE, survivors)
        seconds = time.time() - (folder / "moment").stat().st_mtime
        codes = [started.processes[rank].exitcode for rank in survivors]
        said = [started.said(rank).strip().splitlines()[-1:] for rank in survivors]
    assert ended, f"{how}: survivors of rank {victim} of {world} hang, {codes}: {said}"
    assert all(code == 1 for code in codes), f"{how}: exit codes {codes}: {said}"  # no abort: that is -6
    expected = re.compile(rf"rank {victim} could not take part: ValueError: features must") if how == "nan" else LOST
    assert all(line and expected.search(line[0]) for line in said), f"{how}: {said}"
    return seconds


@pytest.mark.parametrize("trials", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_survivors_of_a_lost_rank_end_and_say_so(trials, tmp_path, figure):
    slowest = {}
    for how in (signal.SIGKILL, signal.SIGSTOP):
        draw = random.Random(f"{how} {trials}")
        seconds = [fail_once(how, draw, tmp_path / f"{how.name}{trial}") for trial in range(trials)]
        slowest[how] = max(seconds)
        assert slowest[how] <= TIMEOUT + GRACE
    figure(
        "R7",
        f"{2 * trials} trials, ranks killed and stopped: 0 hangs; slowest survivor ended {slowest[signal.SIGKILL]:.1f} s"
        f" after a kill, {slowest[signal.SIGSTOP] - TIMEOUT:.1f} s beyond the timeout of {TIMEOUT:g} s after a stop",
    )


@pytest.mark.parametrize("trials", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_survivors_of_a_rank_that_raises_end_and_say_so(trials, tmp_path, figure):
    draw = random.Random(trials)
    seconds = [
        fail_once(how, draw, tmp_path / f"{how}{trial}") for how in ("raise", "sleep", "nan") for trial in range(trials)
    ]
    assert max(seconds) <= TIMEOUT + GRACE
    figure(
        "R8",
        f"{len(seconds)} trials, one rank raising, silent or with NaN: 0 hangs, slowest survivor ended"
        f" {max(seconds):.1f} s later (timeout {TIMEOUT:g} s)",
    )


ONCE_AGREED = {"buffer": (buffer_module, partial(hc.NegativeBuffer, D, 8)), "collapse": (metrics, collapse)}


def leave_once_agreed(rank, world, name):
    """Rank 1 ends between the small collective and what follows it; returns what rank 0 says."""
    module, call = ONCE_AGREED[name]
    if rank:
        module.agree = lambda *arguments: (agree(*arguments), os._exit(3))
    try:
        call()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("name", ONCE_AGREED)
def test_a_rank_lost_after_the_agreement(name, tmp_path):
    with ranks.Ranks(leave_once_agreed, 2, tmp_path, name, timeout=5) as started:
        assert started.join(20)
        assert started.result(0).startswith("LostRankError: rank 0 of 2 lost the connection to another rank")


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection reset by peer"),
            "lost the connection to another rank",
        ),
        (RuntimeError("[gloo/x.cc:1] Timed out waiting 2500ms for recv"), "had no answer from another rank for 2.5 s"),
        (RuntimeError("Application timeout caused pair closure"), "had no answer from another rank"),
        (dist.DistBackendError("NCCL: Timeout(ms)=4000 of a collective"), "had no answer from another rank for 4 s"),
        (dist.DistNetworkError("recv failed"), "lost the connection to another rank"),
        (LostRankError("rank 1 of 2 had no answer"), "rank 1 of 2 had no answer"),
    ],
)
def test_what_a_backend_says_of_a_lost_rank_is_one_sentence(error, what):
    with pytest.raises(LostRankError, match=f"^step 3: .*{re.escape(what)}( at its call|$)"), connected("step 3"):
        raise error


def test_an_error_of_another_kind_stays_itself():
    with pytest.raises(RuntimeError, match="size") as caught, connected():
        torch.zeros(2) @ torch.zeros(3)
    assert not isinstance(caught.value, LostRankError)


# ---- the driver


def start_driver(folder, *flags, **options):
    command = [sys.executable, "-m", "hypercontrast.train", "--limit", "200", "--batch-size", "50", "--cpu-ranks", "2"]
    # A session of its own: a rank that was left alone wakes the whole process group.
    return subprocess.Popen(
        [*command, "--quiet", "--run-dir", str(folder), *flags],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def wait_for_epochs(folder, count):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lines = folder / "metrics.jsonl"
        if lines.exists() and len(lines.read_text().splitlines()) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"no epoch {count} in {folder} after 120 s")


def ranks_of(process):
    ranks = []
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        with suppress(OSError):  # another child, which has ended meanwhile
            if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
                ranks.append(int(pid))
    return ranks


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_run_with_one_line(how, tmp_path, figure):
    timeout = 5
    process = start_driver(tmp_path / "run", "--epochs", "500", "--rank-timeout", str(timeout))
    wait_for_epochs(tmp_path / "run", 1)
    lost = random.choice(ranks_of(process))
    started = time.monotonic()
    os.kill(lost, how)
    _, err = process.communicate(timeout=60)  # returns once no rank holds stderr open any more
    seconds = time.monotonic() - started
    assert process.returncode == 1
    assert err.count("\n") == 1
    if how == signal.SIGKILL:
        assert re.fullmatch(rf"error: rank \d failed: Signal 9 \(SIGKILL\) received by PID {lost}\n", err)
    else:
        where = r"(after )?epoch \d+(, step \d+)?"
        # Gloo's own words do not always carry the timeout, so the seconds are measured below.
        assert re.match(rf"error: rank \d: {where}: rank \d of 2 had no answer from another rank", err)
    assert seconds <= timeout + GRACE
    figure("R7", f"driver, a rank of two {how.name}: one line, ended {seconds:.1f} s later (timeout {timeout} s)")


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
@pytest.mark.parametrize("seconds", [0, 1])
def test_ctrl_c_while_ranks_import_ends_them_with_one_line(seconds, tmp_path):
    """It reaches every process of a terminal; torch alone takes longer than that to import."""
    process = start_driver(tmp_path / "run", "--epochs", "500", preexec_fn=as_from_a_prompt)
    deadline = time.monotonic() + 120
    while len(begun := ranks_of(process)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "error: interrupted before anything was saved\n"
    assert not any(Path(f"/proc/{pid}").exists() for pid in begun)


def outcome(folder):
    """Everything that a run leaves, bit for bit, but for times."""
    lines = re.sub(r'"(seconds|samples_per_second)": [^,}]+', "", (folder / "metrics.jsonl").read_text())
    return lines, (folder / "embeddings.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_restarts_end_where_an_uninterrupted_run_does(tmp_path, figure):
    flags = ["--epochs", "6", "--queue", "64", "--loss", "scl"]
    process = start_driver(tmp_path / "whole", *flags)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    process = start_driver(tmp_path / "killed", *flags, "--max-restarts", "2")
    for epochs in (1, 3):
        wait_for_epochs(tmp_path / "killed", epochs)
        os.kill(random.choice(ranks_of(process)), signal.SIGKILL)
        time.sleep(1)  # until it is noticed
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    told = r"rank \d failed: Signal 9 .*; starting again from the last checkpoint, restarts left: "
    assert re.fullmatch(f"{told}1\n{told}0\n", err)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    figure("R7", "driver, two kills with --max-restarts 2: the result of the uninterrupted run, bitwise")


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_restarts_are_counted_and_a_foreseen_error_is_not_tried_again(tmp_path):
    process = start_driver(tmp_path / "run", "--lr", "1e30", "--max-restarts", "3")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.fullmatch(r"error: rank \d: .*epoch 1, step .*\n", err)
