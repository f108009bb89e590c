"""Robustness to corruptions: the mCE, the published pictures, the generated ones, records that add up, mistakes."""

import io
import json
import os
import shutil
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import hypercontrast.corruptions
from hypercontrast.config import UsageError, configure
from hypercontrast.corruptions import (
    ALEXNET,
    HEADER,
    Options,
    corruption_errors,
    main,
    mean_corruption_error,
    measure,
    row,
    summary,
)
from hypercontrast.data import Images, corrupted, derived_seed
from hypercontrast.data.corrupted import BATCH, CORRUPTIONS, SEED, SEVERITIES, Generated, ImageNetC
from hypercontrast.launch import Ranks
from hypercontrast.train import train
from hypercontrast.workspace import restored, runnable_config

for extra in ("mlxtend", "safetensors", "yaml"):
    pytest.importorskip(extra)
Image = pytest.importorskip("PIL.Image")

CPU = Ranks(0, 1, torch.device("cpu"))
CLASSES = ("n01440764", "n01443537", "n02979186")


# The mCE.


def test_mce_by_hand():
    errors = {c: [0.1, 0.2, 0.3, 0.4, 0.5] for c in CORRUPTIONS} | {"fog": [0.9, 0.9, 0.9, 0.9, 0.9]}
    reference = dict.fromkeys(CORRUPTIONS, 0.6) | {"fog": 0.75, "snow": 0.4}
    ce = corruption_errors(errors, reference)
    assert ce["fog"] == pytest.approx(120)
    assert ce["snow"] == pytest.approx(75)
    assert ce["frost"] == pytest.approx(50)
    assert mean_corruption_error(ce) == pytest.approx((13 * 50 + 120 + 75) / 15)


def test_perfect_is_0_and_the_reference_100():
    assert tuple(ALEXNET) == CORRUPTIONS
    perfect = corruption_errors({c: [0.0] * 5 for c in CORRUPTIONS}, ALEXNET)
    assert mean_corruption_error(perfect) == 0
    alexnet = corruption_errors({c: [error] * 5 for c, error in ALEXNET.items()}, ALEXNET)
    assert mean_corruption_error(alexnet) == pytest.approx(100)


@pytest.mark.parametrize("lacking", ["corruption", "severity", "reference"])
def test_no_mce_from_a_part(lacking):
    errors = {c: [0.5] * 5 for c in CORRUPTIONS}
    reference = dict(ALEXNET)
    if lacking == "corruption":
        del errors["fog"]
    elif lacking == "severity":
        errors["fog"] = [0.5, 0.5, 0.5, 0.5, None]
    else:
        del reference["fog"]
    ce = corruption_errors(errors, reference)
    assert ce.keys() == set(CORRUPTIONS) - {"fog"}
    assert mean_corruption_error(ce) is None


# ImageNet-C as published.


def picture(seed, size=224):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def save(path, pixels):
    """Losslessly, for the name says nothing to a decoder that looks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "PNG", compress_level=0)


def imagenet_c(root, corruptions=CORRUPTIONS, severities=SEVERITIES, per_class=1, category="", size=224):
    for c in corruptions:
        for s in severities:
            for label, name in enumerate(CLASSES):
                for n in range(per_class):
                    seed = (CORRUPTIONS.index(c), s, label, n)
                    save(root / "imagenet-c" / category / c / str(s) / name / f"{n}.JPEG", picture(seed, size))
    return root


def opened(root, names=CLASSES, limit=0, corruptions=("fog",), severities=(3,)):
    return ImageNetC(root, names, corruptions, severities, limit=limit, workers=2)


@pytest.mark.parametrize("category", ["", "weather"])
def test_both_layouts_and_only_the_classes_of_the_run(tmp_path, category):
    source = opened(imagenet_c(tmp_path, ["fog"], [3], 2, category), names=(CLASSES[2], CLASSES[0]))
    assert source.pictures == 4
    (batch,) = source.batches("fog", 3)
    assert batch.labels.tolist() == [0, 0, 1, 1]
    assert batch.damaged == ()
    expected = [picture((CORRUPTIONS.index("fog"), 3, label, n)) for label in (2, 0) for n in range(2)]
    np.testing.assert_array_equal(batch.pixels, np.stack(expected).transpose(0, 3, 1, 2))


def test_the_middle_is_taken_and_a_limit_is_balanced(tmp_path):
    source = opened(imagenet_c(tmp_path, ["fog"], [3], 3, size=230), limit=6)
    (batch,) = source.batches("fog", 3)
    assert sorted(batch.labels.tolist()) == [0, 0, 1, 1, 2, 2]
    whole = picture((CORRUPTIONS.index("fog"), 3, int(batch.labels[0]), 0), 230)
    np.testing.assert_array_equal(batch.pixels[0], whole[3:227, 3:227].transpose(2, 0, 1))


def test_more_pictures_than_a_batch_come_in_order(tmp_path):
    (tmp_path / "imagenet-c/fog/3" / CLASSES[0]).mkdir(parents=True)
    one = io.BytesIO()
    Image.fromarray(picture(0)).save(one, "JPEG")
    for n in range(5 * BATCH + 7):
        (tmp_path / "imagenet-c/fog/3" / CLASSES[0] / f"{n:04}.JPEG").write_bytes(
            one.getvalue()[: -9 if n == 70 else None]
        )
    batches = list(opened(tmp_path, CLASSES[:1]).batches("fog", 3))
    assert [len(b.labels) for b in batches] == [BATCH, BATCH - 1, BATCH, BATCH, BATCH, 7]
    assert [b.damaged for b in batches if b.damaged] == [(f"fog/3/{CLASSES[0]}/0070.JPEG",)]


def test_damaged_pictures_are_named_and_left_out(tmp_path):
    folder = imagenet_c(tmp_path, ["fog"], [3], 3) / "imagenet-c/fog/3"
    (folder / CLASSES[0] / "1.JPEG").write_bytes(b"")
    whole = (folder / CLASSES[1] / "0.JPEG").read_bytes()
    (folder / CLASSES[1] / "0.JPEG").write_bytes(whole[: len(whole) // 2])
    save(folder / CLASSES[2] / "2.JPEG", picture(0, 223))
    (batch,) = opened(tmp_path).batches("fog", 3)
    assert batch.damaged == (f"fog/3/{CLASSES[0]}/1.JPEG", f"fog/3/{CLASSES[1]}/0.JPEG", f"fog/3/{CLASSES[2]}/2.JPEG")
    assert batch.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.pixels.shape == (6, 3, 224, 224)
    kept = [(0, 0), (0, 2), (1, 1), (1, 2), (2, 0), (2, 1)]
    expected = [picture((CORRUPTIONS.index("fog"), 3, *which)) for which in kept]
    np.testing.assert_array_equal(batch.pixels, np.stack(expected).transpose(0, 3, 1, 2))


def test_a_grey_picture_has_three_equal_channels(tmp_path):
    """ImageNet has some, and JPEG keeps them in one: they are not damaged."""
    folder = imagenet_c(tmp_path, ["fog"], [3], 1) / "imagenet-c/fog/3"
    grey = picture(3)[:, :, 0]
    Image.fromarray(grey).save(folder / CLASSES[1] / "0.JPEG", "JPEG", quality=100)
    assert Image.open(folder / CLASSES[1] / "0.JPEG").mode == "L"
    (batch,) = opened(tmp_path).batches("fog", 3)
    assert batch.damaged == ()
    assert (batch.pixels[1] == batch.pixels[1, 0]).all()
    np.testing.assert_allclose(batch.pixels[1, 0].astype(int), grey, atol=2)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(
        UsageError, match=r"expected .*imagenet-c/fog/3/nXXXXXXXX/\*.JPEG \(https://zenodo.org/records/2235448\)"
    ):
        opened(tmp_path)
    folder = imagenet_c(tmp_path, ["fog"], [3, 4], 2) / "imagenet-c/fog/4"
    with pytest.raises(UsageError, match=r"expected .*imagenet-c/snow/3/"):
        opened(tmp_path, corruptions=("fog", "snow"))
    with pytest.raises(UsageError, match="classes are WordNet ids, got 'cat'"):
        opened(tmp_path, names=("cat", CLASSES[0]))
    with pytest.raises(UsageError, match="fog/3 must hold pictures of every class of the run, got none in n09999999"):
        opened(tmp_path, names=(CLASSES[0], "n09999999"))
    source = opened(tmp_path, severities=(3, 4))
    (folder / CLASSES[1] / "1.JPEG").unlink()
    with pytest.raises(UsageError, match="fog/4 must hold 6 pictures like the others, got 5"):
        source.batches("fog", 4)


# Pictures corrupted here.


@pytest.fixture
def package():
    return pytest.importorskip("imagecorruptions", reason="needs imagecorruptions-imaug, the extra robust")


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_picture_is_what_the_package_makes(package, corruption):
    """Also under the same random numbers: those of the picture, whatever the global generator holds."""
    colour = picture(0, 40)[:, :36]
    assert corruption in package.get_corruption_names()
    for severity in SEVERITIES:
        before = np.random.get_state()[1].copy()  # noqa: NPY002
        made = corrupted.corrupted(colour.transpose(2, 0, 1), corruption, severity, 7)
        np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
        seed = derived_seed(SEED, corruption, severity, 7) % 2**32
        np.random.seed(seed)  # noqa: NPY002
        own = {"seed": seed} if corruption in ("impulse_noise", "glass_blur") else {}
        expected = package.corrupt(colour, severity, corruption, **own)
        np.testing.assert_array_equal(made, expected.transpose(2, 0, 1))
        assert (made != colour.transpose(2, 0, 1)).any()


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_small_grey_picture_is_padded_and_comes_back_grey(package, corruption):
    grey = picture(1, 28)[:, :, :1].transpose(2, 0, 1)
    made = corrupted.corrupted(grey, corruption, 5, 0)
    assert (made.dtype, made.shape) == (np.uint8, (1, 28, 28))
    padded = np.pad(grey, [(0, 0), (2, 2), (2, 2)], mode="edge").repeat(3, 0)
    np.testing.assert_array_equal(made, corrupted.corrupted(padded, corruption, 5, 0)[1:2, 2:30, 2:30])


def test_each_picture_has_random_numbers_of_its_own(package):
    colour = picture(2, 32).transpose(2, 0, 1)
    for corruption in ("gaussian_noise", "impulse_noise", "glass_blur"):
        one, same, another = (corrupted.corrupted(colour, corruption, 2, index) for index in (0, 0, 1))
        np.testing.assert_array_equal(one, same)
        assert (one != another).any()


# Runs.


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "digits"
    return train(
        configure(loss="nonl", epochs=1, limit=200, batch_size=50, quiet=True, cpu_ranks=1, run_dir=str(folder))
    )


@pytest.fixture
def run(digits, tmp_path):
    return shutil.copytree(digits, tmp_path / "run")


@pytest.fixture
def inverting(monkeypatch):
    """In place of the package, in this process: every corruption inverts severity fifths of the rows."""

    def corrupt(image, severity, corruption_name, seed=None):
        assert image.shape == (32, 32, 3)
        rows = severity * len(image) // 5
        return np.concatenate([255 - image[:rows], image[rows:]])

    monkeypatch.setitem(sys.modules, "imagecorruptions", types.SimpleNamespace(corrupt=corrupt))
    monkeypatch.setattr(corrupted, "ProcessPoolExecutor", lambda workers, *_, **__: ThreadPoolExecutor(1))


def error_of(run, pixels, labels):
    """By the network itself, on pictures [n, C, H, W]."""
    workspace, _ = restored(str(run), runnable_config(str(run), cpu_ranks=1), CPU)
    network = workspace.network.eval()
    with torch.no_grad():
        scores = network.scores(network(workspace.normalized(torch.as_tensor(pixels))))
    return float((scores.argmax(1) != torch.as_tensor(labels)).double().mean())


def record_in(run):
    return json.loads((run / "corruptions.json").read_text())


def test_results_of_a_call_at_the_same_time_are_kept(run, inverting, monkeypatch):
    fog = measure(Options(str(run), limit=30, corruptions=("fog",)))
    (run / "corruptions.json").rename(run / "meanwhile")
    error = hypercontrast.corruptions._error

    def error_while_another_call_ends(*args):
        if (run / "meanwhile").exists():
            (run / "meanwhile").rename(run / "corruptions.json")
        return error(*args)

    monkeypatch.setattr(hypercontrast.corruptions, "_error", error_while_another_call_ends)
    both = measure(Options(str(run), limit=30, corruptions=("snow",)))
    assert both == record_in(run)
    assert both["errors"].keys() == {"fog", "snow"}
    assert both["errors"]["fog"] == fog["errors"]["fog"]


def test_a_run_on_generated_pictures(run, inverting, capsys):
    record = measure(Options(str(run), limit=30))
    lines = capsys.readouterr().out.splitlines()
    assert record == record_in(run)
    assert lines == [HEADER, *(row(c, record["errors"][c], {}) for c in CORRUPTIONS)]
    assert {len(line) for line in lines} == {65}
    assert (record["epoch"], record["source"], record["classes"], record["pictures"]) == (1, "generated", 10, 30)
    assert record["reference"] is record["mce"] is None
    assert record["damaged"] == []
    workspace, _ = restored(str(run), runnable_config(str(run), cpu_ranks=1), CPU)
    clean = workspace.dataset.limited(30).validation
    assert record["clean_error"] == pytest.approx(error_of(run, clean.pixels, clean.labels))
    inverted = 255 - clean.pixels
    assert record["errors"]["fog"][4] == pytest.approx(error_of(run, inverted, clean.labels))
    half = torch.cat(
        [inverted[:, :, : 19 - 2], clean.pixels[:, :, 19 - 2 :]], dim=2
    )  # 19 of 32 rows, 2 of them padding
    assert record["errors"]["snow"][2] == pytest.approx(error_of(run, half, clean.labels))
    assert "no mCE: it needs a --reference" in summary(record)


def test_a_run_is_its_own_100(run, inverting, capsys):
    shutil.copytree(run, run.parent / "other")
    measure(Options(str(run.parent / "other"), limit=10))
    capsys.readouterr()
    assert main([str(run), "--limit", "10", "--reference", str(run.parent / "other")]) == 0
    record = record_in(run)
    assert record["mce"] == pytest.approx(100)
    assert record["ce"] == pytest.approx(dict.fromkeys(CORRUPTIONS, 100))
    assert capsys.readouterr().out.splitlines()[-1] == f"mCE 100.0 % (reference: {run.parent / 'other'})"


def test_calls_add_up(run, inverting, capsys):
    assert main([str(run), "--corruptions", "snow", "fog", "--severities", "5", "1", "--limit", "10"]) == 0
    first = record_in(run)["errors"]
    assert {c: [e is None for e in errors] for c, errors in first.items()} == {
        c: [False, True, True, True, False] for c in ("snow", "fog")
    }
    assert capsys.readouterr().out.count("–") == 2 * 4
    others = [c for c in CORRUPTIONS if c not in ("snow", "fog")]
    assert main([str(run), "--corruptions", *others, "--limit", "10"]) == 0
    assert main([str(run), "--corruptions", "snow", "fog", "--severities", "2", "3", "4", "--limit", "10"]) == 0
    added = record_in(run)
    (run / "corruptions.json").unlink()
    assert measure(Options(str(run), limit=10)) == added | {"errors": {c: added["errors"][c] for c in CORRUPTIONS}}


def test_what_was_measured_survives_an_interruption(run, inverting, monkeypatch, capsys):
    make = corrupted._corrupted_batch

    def interrupted(batch, index, corruption, severity):
        if (corruption, severity) == ("impulse_noise", 3):
            raise KeyboardInterrupt
        return make(batch, index, corruption, severity)

    monkeypatch.setattr(corrupted, "_corrupted_batch", interrupted)
    assert main([str(run), "--limit", "20"]) == 130
    assert capsys.readouterr().err == "error: interrupted; the corruptions measured to their end are kept\n"
    assert list(record_in(run)["errors"]) == ["gaussian_noise", "shot_noise"]


def test_fewer_pictures_never_replace_more(run, inverting, capsys):
    few = ["--corruptions", "fog", "--severities", "1"]
    assert main([str(run), *few, "--limit", "20"]) == 0
    kept = (run / "corruptions.json").read_text()
    assert main([str(run), *few, "--limit", "10"]) == 2
    assert "must be moved away first: it holds results on 20 generated pictures, and a" in capsys.readouterr().err
    assert (run / "corruptions.json").read_text() == kept


def test_one_source_never_replaces_another(run, inverting, capsys):
    measured(run, source="imagenet-c", pictures=20)
    kept = (run / "corruptions.json").read_text()
    assert main([str(run), "--corruptions", "fog", "--limit", "30"]) == 2
    says = "results on 20 imagenet-c pictures, and a measurement on 30 generated ones would replace them"
    assert says in capsys.readouterr().err
    assert (run / "corruptions.json").read_text() == kept


def die(*_):
    os._exit(1)


def test_a_worker_that_is_killed_ends_the_call(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imagecorruptions", types.SimpleNamespace())
    monkeypatch.setattr(corrupted, "_corrupted_batch", die)
    assert main([str(run), "--workers", "1", "--limit", "10"]) == 1
    assert capsys.readouterr().err == (
        "error: a process that corrupts pictures was killed, perhaps for its memory: try fewer --workers\n"
    )


def test_the_package_in_processes_of_its_own(package, run, monkeypatch):
    """The same errors as here, however the pictures are dealt to workers."""
    monkeypatch.setattr(corrupted, "BATCH", 10)
    options = {"corruptions": ("impulse_noise", "gaussian_noise"), "severities": (3,), "limit": 40}
    errors = measure(Options(str(run), workers=2, **options))["errors"]
    workspace, _ = restored(str(run), runnable_config(str(run), cpu_ranks=1), CPU)
    clean = workspace.dataset.limited(40).validation
    for corruption in options["corruptions"]:
        made = np.stack([corrupted.corrupted(p, corruption, 3, index) for index, p in enumerate(clean.pixels.numpy())])
        assert errors[corruption][2] == pytest.approx(error_of(run, made, clean.labels))


def test_without_the_package_it_says_what_to_install(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    assert main([str(run)]) == 2
    err = capsys.readouterr().err
    assert "source generated needs imagecorruptions-imaug: pip install 'hypercontrast[robust]'" in err
    assert err.count("\n") == 1


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory):
    """A run that tells two of the three classes apart, on pictures of 224 pixels."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("wordnet")
    for split in ("train", "val"):
        for label, name in enumerate(CLASSES[1:]):
            for n in range(2):
                save(root / "pictures" / split / name / f"{n}.png", picture((label, n)))
    dataset = f"folder:{root / 'pictures'}"
    return train(
        configure(
            loss="ce", dataset=dataset, epochs=1, batch_size=4, quiet=True, cpu_ranks=1, run_dir=str(root / "run")
        )
    )


def test_a_run_on_imagenet_c(wordnet, tmp_path, capsys):
    run = shutil.copytree(wordnet, tmp_path / "run")
    imagenet_c(tmp_path)
    flags = [str(run), "--source", "imagenet-c", "--data-root", str(tmp_path), "--workers", "2"]
    (tmp_path / "imagenet-c/frost/2" / CLASSES[1] / "0.JPEG").write_bytes(b"no picture")
    assert main([*flags, "--corruptions", "fog", "frost"]) == 0
    assert "no mCE: it needs all 15 corruptions at all 5 severities, of the run and of the reference, got 2" in (
        capsys.readouterr().out
    )
    assert main(flags) == 0
    out = capsys.readouterr().out
    record = record_in(run)
    assert (record["source"], record["reference"], record["classes"], record["pictures"]) == (
        "imagenet-c",
        "AlexNet",
        2,
        2,
    )
    assert record["damaged"] == [f"frost/2/{CLASSES[1]}/0.JPEG"], "once, though met twice"
    assert "damaged and left out: 1, such as frost/2/" in out
    assert "AlexNet's errors are over 1000 classes" in out
    for severity in SEVERITIES:
        pixels = [picture((CORRUPTIONS.index("snow"), severity, label, 0)) for label in (1, 2)]
        expected = error_of(run, np.stack(pixels).transpose(0, 3, 1, 2), [0, 1])
        assert record["errors"]["snow"][severity - 1] == expected
    assert record["mce"] == pytest.approx(
        100 * sum(np.mean(record["errors"][c]) / ALEXNET[c] for c in CORRUPTIONS) / 15, rel=1e-9
    )


# Mistakes.


def measured(run, **change):
    """A record of another run, as on the digits."""
    record = {"epoch": 1, "source": "generated", "dataset": "mnist5k", "classes": 10, "pictures": 200, "errors": {}}
    record["damaged"] = []
    (run / "corruptions.json").write_text(json.dumps(record | change))


@pytest.mark.parametrize(
    ("prepare", "flags", "says"),
    [
        (None, ["--source", "cifar-c"], "source must be among imagenet-c, generated, got 'cifar-c'"),
        (None, ["--corruptions", "fog", "rain"], "corruptions must be among gaussian_noise, "),
        (None, ["--severities", "0"], "severities must be among 1, 2, 3, 4, 5, got 0"),
        (None, ["--severities", "high"], "argument --severities: invalid int value: 'high'"),
        (None, ["--limit", "-1"], "limit must be at least 0, got -1"),
        (None, ["--workers", "0"], "workers must be at least 1, got 0"),
        (None, ["--source", "imagenet-c"], "source imagenet-c needs a run on pictures of 3 x 224 x 224, got 1 x 28 x 28"),
        (None, ["--reference", "/nowhere"], "reference must be a run measured by hypercontrast.corruptions, got no /nowhere/"),
        ({"dataset": "cifar10"}, ["--reference"], "reference must have the same dataset as the run, mnist5k, got cifar10"),
        ({"classes": 100}, ["--reference"], "reference must have the same classes as the run, 10, got 100"),
        ({"pictures": 100}, ["--reference"], "reference must have the same pictures as the run, 200, got 100"),
        ({"source": "imagenet-c"}, ["--reference"], "reference must have the same source as the run, generated, got imagenet-c"),
        ({"errors": {"fog": [0.0] * 5}}, ["--reference"], "reference must have an error to divide by, got none under fog"),
    ],
)  # fmt: skip
def test_a_mistake_gives_one_line_and_code_2(run, inverting, prepare, flags, says, capsys):
    other = run.parent / "other"
    if prepare is not None:
        other.mkdir()
        measured(other, **prepare)
        flags = [*flags, str(other)]
    assert main([str(run), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1
    assert not (run / "corruptions.json").exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"epoch": 1}',
        {"errors": []},
        {"errors": {"fog": [0.1]}},
        {"errors": {"fog": ["high"] * 5}},
        {"errors": {"fog": [2.0] * 5}},
        {"damaged": 5},
        {"damaged": [5]},
        {"pictures": "200"},
    ],
)
def test_a_damaged_record_is_not_built_on(run, inverting, content, capsys):
    if isinstance(content, dict):
        measured(run, **content)
    else:
        (run / "corruptions.json").write_text(content)
    assert main([str(run)]) == 2
    assert "corruptions.json must be as hypercontrast.corruptions wrote it: delete it" in capsys.readouterr().err


def test_a_record_may_hold_errors_of_none_and_of_all(run, inverting, capsys):
    measured(run, errors={"fog": [0.0, 0.0, 1.0, 1.0, 1.0]})
    assert main([str(run), "--corruptions", "snow", "--severities", "1"]) == 0
    assert record_in(run)["errors"]["fog"] == [0.0, 0.0, 1.0, 1.0, 1.0]


def test_errors_of_another_epoch_are_not_built_on(run, inverting, capsys):
    measured(run, epoch=7, errors={"fog": [0.5] * 5})
    assert main([str(run), "--corruptions", "snow", "--severities", "1"]) == 0
    assert list(record_in(run)["errors"]) == ["snow"]


def test_pictures_all_damaged_are_no_error_rate(wordnet, tmp_path, capsys):
    run = shutil.copytree(wordnet, tmp_path / "run")
    for file in imagenet_c(tmp_path, ["fog"], [1]).glob("imagenet-c/fog/1/*/*"):
        file.write_bytes(b"")
    flags = ["--source", "imagenet-c", "--data-root", str(tmp_path), "--corruptions", "fog", "--severities", "1"]
    assert main([str(run), *flags]) == 2
    assert "there must be pictures that can be read, got damaged ones alone: fog/1/" in capsys.readouterr().err


def test_something_must_be_measured():
    with pytest.raises(UsageError, match="corruptions and severities must name at least one each, got none"):
        Options("run", corruptions=())


def test_importing_needs_no_extra():
    blocked = ("tyro", "yaml", "rich", "torchvision", "safetensors", "pyarrow", "PIL", "mlxtend", "imagecorruptions")
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport hypercontrast.corruptions"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_generated_pictures_keep_the_order_of_the_set(inverting):
    images = Images(torch.arange(150, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 30, 30), torch.arange(150) % 3)
    source = Generated(images, limit=0, workers=1)
    with source.pool:
        batches = list(source.batches("fog", 5))
    assert [len(b.labels) for b in batches] == [BATCH, BATCH, 150 - 2 * BATCH]
    np.testing.assert_array_equal(np.concatenate([b.pixels for b in batches])[:, 0, 0, 0], 255 - np.arange(150))
    np.testing.assert_array_equal(np.concatenate([b.labels for b in batches]), np.arange(150) % 3)
