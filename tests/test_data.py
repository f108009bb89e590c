"""Samplers, the random numbers of pictures, and long tails."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hypercontrast import data
from hypercontrast.data.sampler import CLASS_POWERS


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Batches


@settings(derandomize=True)
@given(samples=st.integers(1, 300), batch=st.integers(1, 64), world=st.integers(1, 5), epoch=st.integers(1, 3))
def test_every_sample_comes_once_an_epoch(samples, batch, world, epoch):
    labels = torch.arange(samples) % 7
    parts = [
        list(data.epoch_batches(labels, batch, seed=7, epoch=epoch, rank=rank, world=world)) for rank in range(world)
    ]
    everything = torch.cat([share.indices for part in parts for share in part])
    assert everything.sort().values.equal(torch.arange(samples))

    assert len({len(part) for part in parts}) == 1
    for step in zip(*parts, strict=True):
        sizes = [len(share.indices) for share in step]
        assert sum(sizes) == step[0].global_size <= batch
        assert max(sizes) - min(sizes) <= 1
    global_sizes = [share.global_size for share in parts[0]]
    assert max(global_sizes) - min(global_sizes) <= 1


@pytest.mark.parametrize("sampling", ["all", *CLASS_POWERS])
@pytest.mark.parametrize("world", [1, 3])
def test_a_place_comes_once_and_holds_the_same_picture_on_any_number_of_ranks(sampling, world):
    labels = torch.randint(0, 5, (103,), generator=generator())
    held = torch.full((103,), -1)
    for rank in range(world):
        for share in data.epoch_batches(labels, 20, seed=1, epoch=2, rank=rank, world=world, sampling=sampling):
            assert (held[share.places] == -1).all()
            held[share.places] = share.indices
    alone = torch.cat([share.indices for share in data.epoch_batches(labels, 20, seed=1, epoch=2, sampling=sampling)])
    assert held.equal(alone)


@pytest.mark.parametrize(("sampling", "chances"), [("balanced", [1, 1, 1]), ("sqrt", [30, 10, 5])])
def test_classes_are_drawn_as_asked(sampling, chances):
    """Of classes of 9,000, 1,000 and 250 pictures; within 4.5 standard errors, every picture of a class alike."""
    counts = torch.tensor([9000, 1000, 250])
    labels = torch.arange(3).repeat_interleave(counts)[torch.randperm(10250, generator=generator())]
    drawn = torch.zeros(len(labels))
    epochs = 8
    for epoch in range(epochs):
        for share in data.epoch_batches(labels, 512, seed=3, epoch=epoch, sampling=sampling):
            drawn += torch.bincount(share.indices, minlength=len(labels))
    assert drawn.sum() == epochs * len(labels)
    expected = torch.tensor(chances) / sum(chances) * drawn.sum()
    found = torch.stack([drawn[labels == c].sum() for c in range(3)])
    assert ((found - expected).abs() < 4.5 * (expected * (1 - expected / drawn.sum())).sqrt()).all()
    for c in range(3):  # Pearson's statistic against a uniform draw has mean n - 1 and variance 2 (n - 1)
        own = drawn[labels == c]
        freedom = len(own) - 1
        statistic = ((own - own.mean()) ** 2).sum() / own.mean()
        assert abs(statistic - freedom) < 4.5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("sampling", CLASS_POWERS)
def test_draws_are_those_of_multinomial(sampling):
    labels = (20 * torch.rand(5000, generator=generator()) ** 3).long()
    (share,) = data.epoch_batches(labels, len(labels), seed=3, epoch=1, sampling=sampling)
    chances = torch.bincount(labels).double()[labels] ** (CLASS_POWERS[sampling] - 1)
    seeded = generator(data.derived_seed(3, 1, "batches"))
    assert share.indices.equal(torch.multinomial(chances, len(labels), replacement=True, generator=seeded))


@pytest.mark.slow
def test_a_class_is_drawn_from_more_pictures_than_multinomial_takes():
    labels = torch.zeros(2**24 + 1, dtype=torch.int64)
    labels[-1] = 1
    (share,) = data.epoch_batches(labels, len(labels), seed=0, epoch=1, sampling="balanced")
    drawn = labels[share.indices].sum()
    assert abs(drawn - len(labels) / 2) < 4.5 * math.sqrt(len(labels) / 4)


def test_batches_depend_on_seed_and_epoch_alone():
    def order(**options):
        labels = torch.zeros(100, dtype=torch.int64)
        return torch.cat([share.indices for share in data.epoch_batches(labels, 10, **options)])

    assert order(seed=1, epoch=1).equal(order(seed=1, epoch=1))
    assert not order(seed=1, epoch=1).equal(order(seed=1, epoch=2))
    assert not order(seed=1, epoch=1).equal(order(seed=2, epoch=1))


def test_derived_seeds_are_distinct_and_valid():
    """1, 11 and 11, 1 too."""
    seeds = {data.derived_seed(seed, epoch, "x") for seed in range(12) for epoch in range(12)}
    assert len(seeds) == 144
    assert all(0 <= seed < 2**63 for seed in seeds)


@settings(derandomize=True)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_every_prefix_of_the_balanced_order_is_balanced(labels):
    y = torch.tensor(labels)
    order = data.balanced_order(y)
    assert order.sort().values.equal(torch.arange(len(y)))
    totals = torch.bincount(y, minlength=5)
    for length in range(1, len(y) + 1):
        seen = torch.bincount(y[order[:length]], minlength=5)
        # A class may lag behind the fullest one by two only if it has run out.
        assert bool(((seen.max() - seen <= 1) | (seen == totals)).all())


# Random numbers that belong to pictures


def test_draws_are_uniform():
    """Mean, variance, and Pearson's statistic over 64 cells, of all numbers and of the n-th of every picture."""
    values = data.Draws(17, torch.arange(4096)).uniform(64).double()
    assert values.min() >= 0
    assert values.max() < 1
    for x in (values.flatten(), *values.T[::9], *values[::500]):
        n = len(x)
        assert abs(x.mean() - 1 / 2) < 4.5 * math.sqrt(1 / 12 / n)
        assert abs(x.var() - 1 / 12) < 4.5 * math.sqrt(1 / 180 / n)
    cells = torch.histc(values.flatten(), 64, 0, 1)
    expected = values.numel() / 64
    assert abs(((cells - expected) ** 2).sum() / expected - 63) < 4.5 * math.sqrt(2 * 63)


def test_draws_are_independent_between_pictures_counts_and_seeds():
    """No correlation with the next picture, the next number, the next seed; places far apart, and of large sets too."""
    places = torch.cat([torch.arange(2048), torch.arange(2048) + (1 << 33)])
    values = data.Draws(5, places).uniform(16).double() - 0.5
    others = data.Draws(6, places).uniform(16).double() - 0.5
    pairs = {
        "next picture": (values[:-1], values[1:]),
        "next number": (values[:, :-1], values[:, 1:]),
        "next seed": (values, others),
        "far apart": (values[:2048], values[2048:]),
        "diagonal": (values[:-1, :-1], values[1:, 1:]),
    }
    for name, (x, y) in pairs.items():
        correlation = (x * y).mean() * 12
        assert abs(correlation) < 4.5 / math.sqrt(x.numel()), name
    assert not values.eq(others).any(1).all()


def test_draws_of_a_picture_are_the_same_in_any_batch():
    places = torch.randperm(1000, generator=generator())[:100]
    together = data.Draws(3, places)
    first, second = together.uniform(4, 2), together.uniform()
    assert first.shape == (100, 4, 2)
    assert second.shape == (100,)
    for n in (0, 57, 99):
        alone = data.Draws(3, places[n : n + 1])
        assert alone.uniform(4, 2)[0].equal(first[n])
        assert alone.uniform()[0] == second[n]
    back = data.Draws(3, places.flip(0))
    assert back.uniform(8).flip(0).equal(first.flatten(1))
    state = torch.get_rng_state()
    data.Draws(3, places).uniform(4)
    assert torch.get_rng_state().equal(state)


# Long tails


@pytest.mark.parametrize(
    ("largest", "classes", "imbalance", "total", "smallest"),
    [
        (5000, 10, 0.1, 20431, 500),
        (5000, 10, 0.02, 13996, 100),
        (5000, 10, 0.01, 12406, 50),
        (500, 100, 0.1, 19573, 50),
        (500, 100, 0.02, 12608, 10),
        (500, 100, 0.01, 10847, 5),
    ],
)
def test_exponential_long_tails_are_the_published_ones(largest, classes, imbalance, total, smallest):
    """Sizes of CIFAR-10-LT and CIFAR-100-LT at imbalance factors of 10, 50 and 100 (Cui et al. 2019)."""
    counts = data.long_tailed_counts(largest, classes, imbalance, "exp")
    assert (sum(counts), counts[0], counts[-1]) == (total, largest, smallest)
    for c, count in enumerate(counts):
        # An integer n is n_max·imbalance^(c/(K-1)) rounded down if its power of K-1 is at most that of the product.
        bound = largest ** (classes - 1) * round(imbalance * 100) ** c
        assert count ** (classes - 1) * 100**c <= bound < (count + 1) ** (classes - 1) * 100**c


@pytest.mark.parametrize(("largest", "classes"), [(5000, 10), (500, 100)])
@pytest.mark.parametrize(("imbalance", "divisor"), [(0.1, 10), (0.02, 50), (0.01, 100)])
def test_stepped_long_tails(largest, classes, imbalance, divisor):
    counts = data.long_tailed_counts(largest, classes, imbalance, "step")
    assert counts == [largest] * (classes // 2) + [largest // divisor] * (classes // 2)


def test_a_long_tail_takes_the_first_of_every_class_for_training_alone():
    labels = torch.arange(5).repeat(40)
    images = data.Images(torch.zeros(200, 1, 2, 2, dtype=torch.uint8), labels)
    images.pixels[:, 0, 0, 0] = torch.arange(200, dtype=torch.uint8)
    full = data.Dataset(images, images, tuple("abcde"), "shift")
    tail = full.long_tailed(0.1, "exp")
    assert torch.bincount(tail.train.labels).tolist() == data.long_tailed_counts(40, 5, 0.1, "exp")
    assert len(tail.validation) == 200
    for c in range(5):
        own = tail.train.pixels[tail.train.labels == c, 0, 0, 0]
        assert own.tolist() == list(range(c, 200, 5))[: len(own)]


# Statistics


def test_normalized_pictures_have_no_mean_and_unit_spread():
    pixels = torch.randint(0, 256, (40, 3, 8, 8), generator=generator(), dtype=torch.uint8)
    pixels[:, 1] //= 3
    images = data.Images(pixels, torch.zeros(40, dtype=torch.int64))
    mean, std = data.Dataset(images, images, ("only",), "shift").statistics()
    normal = data.normalize(pixels, mean, std).transpose(0, 1).flatten(1)
    assert normal.mean(1).abs().max() < 1e-5
    assert (normal.std(1, correction=0) - 1).abs().max() < 1e-4
