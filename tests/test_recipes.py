"""Every recipe: what it says, its dry run without any data at hand, and one step on random pictures."""

import re
from pathlib import Path

import pytest
import torch
from cases import quick

from hypercontrast import data
from hypercontrast.config import configure, read_recipe, recipe_names
from hypercontrast.data import FACTS
from hypercontrast.launch import Ranks
from hypercontrast.objective import VIEWS, Objective
from hypercontrast.plan import _published_extent, plan
from hypercontrast.step import Step
from hypercontrast.workspace import build_network

for extra in ("yaml", "torchvision"):
    pytest.importorskip(extra)

CPU = Ranks(0, 1, torch.device("cpu"))
LEARNED = ("ce", "normface", "ntce", "nonl", "etf-dr")
DATASETS = ("mnist5k", "cifar10", "cifar100", "imagenet100", "imagenet1k")
BEYOND = ("signed", "queue", "accumulate", "learned", "cosine")


def test_there_is_a_recipe_for_every_cell():
    names = {f"{dataset}-{loss}" for dataset in DATASETS for loss in (*LEARNED, "scl")}
    names |= {
        f"{cifar}lt-{imb}-{loss}" for cifar in ("cifar10", "cifar100") for imb in (0.1, 0.02, 0.01) for loss in LEARNED
    }
    names |= {f"imagenet1k-{loss}-{batch}" for loss in LEARNED[:4] for batch in (4096, 8192)}
    names |= {f"{dataset}-nonl-{way}" for dataset in ("mnist5k", "cifar10") for way in BEYOND}
    assert recipe_names() == sorted(names)


def test_every_command_for_a_table_names_a_recipe():
    page = Path(__file__).parents[1].joinpath("REPRODUCE.md").read_text(encoding="utf-8")
    named = set()
    for row in re.findall(r"^\| \d.*$", page, flags=re.MULTILINE):
        runs = row.split("|")[3]
        own = re.search(r"LOSS of ([^|]+)", runs)
        losses = own[1].strip().split(", ") if own else LEARNED
        for name in re.findall(r"`(?:--recipe )?([\w.-]+-(?:LOSS|scl)[\w-]*)", runs):
            named |= {name.replace("LOSS", loss) for loss in losses}
    assert "imagenet1k-nonl-8192" in named
    assert named <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_do_what_their_names_say(name):
    recipe = read_recipe(name)
    dataset, _, rest = name.partition("-")
    if dataset.endswith("lt"):
        imbalance, _, rest = rest.partition("-")
        assert (recipe.imbalance, recipe.imbalance_shape) == (float(imbalance), "exp")
    else:
        assert recipe.imbalance == 1
    loss, _, way = ("etf-dr", "", "") if rest == "etf-dr" else rest.partition("-")
    assert (recipe.recipe, recipe.dataset, recipe.loss) == (name, dataset.removesuffix("lt"), loss)
    if way.isdigit():
        assert recipe.batch_size == int(way)
    changed = {
        "signed": recipe.neck == "linear",
        "queue": recipe.queue > 0,
        "accumulate": recipe.accumulate > 1 and recipe.batch_size > read_recipe(f"{dataset}-nonl").batch_size,
        "learned": recipe.temperature_rule == "learned",
        "cosine": recipe.temperature_rule == "cosine",
    }
    assert [word for word, holds in changed.items() if holds] == ([way] if way in changed else [])


def test_recipes_are_the_papers():
    """arXiv 2605.20302, appendix E and tables 9 to 11."""
    best = {
        "cifar100": (0.3, 0.2, 0.1),
        "cifar10": (0.6, 0.6, 0.2),
        "imagenet100": (0.2,) * 3,
        "imagenet1k": (0.1,) * 3,
    }
    for dataset, temperatures in best.items():
        recipes = [read_recipe(f"{dataset}-{loss}") for loss in ("normface", "ntce", "nonl")]
        assert tuple(recipe.temperature for recipe in recipes) == temperatures
    cifar, scl = read_recipe("cifar100-nonl"), read_recipe("cifar100-scl")
    assert (cifar.model, cifar.epochs, cifar.batch_size, cifar.peak_lr, cifar.weight_decay) == (
        "resnet18",
        1000,
        512,
        0.2,
        1e-4,
    )
    assert (scl.epochs, scl.batch_size, scl.peak_lr, scl.head) == (1000, 512, 0.05, "mlp")
    small, large = read_recipe("imagenet100-ntce"), read_recipe("imagenet1k-ntce-4096")
    assert (small.model, small.epochs, small.batch_size, small.peak_lr, small.sync_bn) == (
        "resnet50",
        500,
        1024,
        0.4,
        True,
    )
    assert (small.warmup_epochs, small.warmup_lr) == (10, 0.01)
    assert (large.epochs, large.peak_lr, large.warmup_epochs) == (500, 1.6, 10)
    assert (read_recipe("imagenet100-scl").peak_lr, read_recipe("imagenet1k-scl").peak_lr) == (0.8, 0.8)
    assert read_recipe("imagenet1k-scl").warmup_epochs == 5


def is_quick(name):
    """Of long tails one, of CIFAR-100 none, of ImageNet two recipes: the networks and steps are those of others."""
    others = name.startswith(("imagenet", "cifar100")) or "lt-0.02" in name or "lt-0.1" in name
    return not others or name in ("imagenet1k-nonl", "imagenet1k-scl")


@pytest.mark.parametrize("name", quick(recipe_names(), is_quick))
def test_every_recipe_has_a_dry_run(name, monkeypatch):
    monkeypatch.setattr("hypercontrast.plan.ENOUGH_BYTES", 0)  # time is taken of two pictures
    config = configure(recipe=name, data_root="/nowhere")
    lines = dict(line.split("  ", 1) for line in plan(config).splitlines())
    facts = FACTS[config.dataset]
    assert f"{facts.validation} validation, {facts.classes} classes" in lines["data"]
    assert f"{config.peak_lr:g}" in lines["learning rate"]
    assert " MiB a rank" in lines["memory"]
    assert lines["time"].split()[1].isdigit()
    assert ("missing" in lines) == (config.dataset != "mnist5k")


@pytest.mark.parametrize("name", quick(recipe_names(), is_quick))
def test_every_recipe_takes_a_step(name):
    """On random pictures of the right shape: the loss is finite and every weight that is trained moves."""
    config = configure(recipe=name)
    facts = FACTS[config.dataset]
    pictures = max(2 * config.accumulate, 6)
    torch.manual_seed(0)
    network = build_network(config, facts.channels, facts.image_size, facts.classes)
    views = VIEWS.get(config.loss, 1)
    labels = torch.arange(pictures) % min(facts.classes, pictures // 2)
    counts = torch.bincount(labels, minlength=facts.classes)
    objective = Objective(network, config, CPU, views * pictures, counts)
    step = Step(objective, config, CPU)
    before = {parameter: value.detach().clone() for parameter, value in network.named_parameters()}
    images = torch.randn(views * pictures, facts.channels, facts.image_size, facts.image_size)
    objective.advance(0.5)
    loss = step(images, labels.repeat(views), 1.0, config.peak_lr)
    assert torch.isfinite(loss)
    still = [parameter for parameter, value in network.named_parameters() if value.equal(before[parameter])]
    assert still == []
    assert all(torch.isfinite(value).all() for value in network.parameters())
    if config.temperature_rule == "cosine":
        assert objective.temperature == pytest.approx((config.temperature + config.final_temperature) / 2)


def test_a_plan_of_missing_pictures_says_what_is_missing():
    text = plan(configure(recipe="cifar10lt-0.01-nonl", data_root="/nowhere"))
    assert "12406 training" in text
    assert "missing" in text
    assert str(data.steps_per_epoch(12406, 512)) + " an epoch" in text
    limited = _published_extent(configure(recipe="cifar10-nonl", limit=20_000), "")
    assert (limited.train, limited.validation) == (20_000, 10_000)
