"""The measuring scripts that a test run can afford: the study's grid, and the clock of training epochs."""

import dataclasses

import pytest

pytest.importorskip("yaml")
pytest.importorskip("torchvision")

from bench.epoch import measure
from bench.study import PARTS, SEEDS, collect
from hypercontrast.config import Config, configure


@pytest.mark.parametrize("part", PARTS)
def test_the_study_is_made_of_recipes(part):
    configs = [configure(recipe=recipe, **options) for recipe, options in PARTS[part].items()]
    assert len(configs) >= 2
    assert len(SEEDS) == 3
    # Within a part the losses meet the same data, network and schedule.
    shared = ("dataset", "model", "width", "imbalance", "limit", "weight_decay")
    assert len({tuple(getattr(config, name) for name in shared) for config in configs}) == 1
    assert {field.name for field in dataclasses.fields(Config)} >= set(shared)


def test_collecting_keeps_what_the_tables_read(tmp_path):
    run = tmp_path / "runs" / "part" / "recipe-0"
    run.mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "evaluation.json", "embeddings.safetensors"):
        (run / name).write_text(name)
    (tmp_path / "runs" / "part" / "unfinished").mkdir()
    collect(tmp_path / "runs", tmp_path / "kept")
    kept = sorted(str(path.relative_to(tmp_path / "kept")) for path in (tmp_path / "kept").rglob("*") if path.is_file())
    assert kept == [f"part/recipe-0/{name}" for name in ("config.yaml", "evaluation.json", "metrics.jsonl")]


@pytest.mark.parametrize("loss", ["nonl", "scl"])
def test_epochs_are_clocked(loss):
    row = measure(loss, 40, 1, compile="off", batch_size=20, width=4)
    assert row["pictures_per_s"] == pytest.approx(40 / row["epoch_s"], rel=0.5)
    assert 0 < row["augmentation_share"] < 1
    assert row["compiled"] is False
