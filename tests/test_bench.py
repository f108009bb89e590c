"""The study's grid, and what it keeps."""

import dataclasses
import json

import pytest

pytest.importorskip("yaml")
pytest.importorskip("torchvision")

from bench.study import PARTS, SEEDS, collect, main
from hypercontrast.config import Config, configure, to_yaml


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
    for seed, accuracy in enumerate((0.5, 0.6)):
        run = tmp_path / "runs" / "part" / f"mnist5k-nonl-{seed}"
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(to_yaml(configure(recipe="mnist5k-nonl", seed=seed, epochs=2)))
        lines = [{"epoch": epoch, "loss": 1.0, "accuracy": accuracy, "nc1": 0.25} for epoch in (1, 2)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "evaluation.json").write_text('{"results": []}')
        (run / "embeddings.safetensors").write_text("large")
    (tmp_path / "runs" / "part" / "unfinished").mkdir()
    kept = tmp_path / "kept"
    collect(tmp_path / "runs", kept)
    assert sorted(path.name for path in (kept / "part").iterdir()) == ["mnist5k-nonl-0", "mnist5k-nonl-1"]
    names = sorted(path.name for path in (kept / "part" / "mnist5k-nonl-0").iterdir())
    assert names == ["config.yaml", "evaluation.json", "metrics.jsonl"]
    lines = (kept / "part.md").read_text().splitlines()
    assert lines[0] == "| run | n | top-1, % | NC1 |"
    assert lines[2:] == ["| mnist5k-nonl | 2 | 55.0 ± 7.1 | 0.25 ± 0.00 |"]
    assert (kept / "part.svg").read_text().startswith("<svg")


def test_nothing_to_collect_is_one_line(tmp_path, capsys):
    runs = str(tmp_path / "runs")
    assert main(["--output", runs, "--collect", str(tmp_path / "kept")]) == 2
    assert capsys.readouterr().err == f"error: --output must hold evaluated runs, got none in {runs}\n"
