"""Runs started as from a prompt, what a run has left on disk, and whether two have left the same."""

import json
import signal

from hypercontrast.checkpoint import load_checkpoint

CLOCK = ("seconds", "samples_per_second")


def as_from_a_prompt():
    """For `preexec_fn`: what a shell starts in the background ignores Ctrl-C, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder):
    return [{key: value for key, value in record.items() if key not in CLOCK} for record in records(folder)]


def assert_same_run(left, right):
    """Bitwise: weights, optimiser, queues, history but for the clock, embeddings."""
    a, b = load_checkpoint(left), load_checkpoint(right)
    assert a.epoch == b.epoch
    assert a.tensors.keys() == b.tensors.keys()
    assert all(a.tensors[name].equal(b.tensors[name]) for name in a.tensors)
    momenta = [c.state["optimizer"]["state"] for c in (a, b)]
    assert momenta[0].keys() == momenta[1].keys()
    assert all(momenta[0][k]["momentum_buffer"].equal(momenta[1][k]["momentum_buffer"]) for k in momenta[0])
    for x, y in zip(a.state["queues"], b.state["queues"], strict=True):
        assert x["features"].equal(y["features"])
        assert x["labels"].equal(y["labels"])
        assert x["cursor"] == y["cursor"]
    assert timeless(left) == timeless(right)
    assert (left / "embeddings.safetensors").read_bytes() == (right / "embeddings.safetensors").read_bytes()
