"""Files made to do harm are refused, and nothing in them is run. What a loader could run leaves a marker behind.

The threat model is in SECURITY.md.
"""

import ast
import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from pictures import encoded, make_folder, write_parquet
from test_bad_input import CHECKPOINTS, PICTURES, first, refused, sealed, told, warned_of

from hypercontrast import data, report, table, train
from hypercontrast.checkpoint import STATE, WEIGHTS, Checkpoint, CheckpointError, save_checkpoint
from hypercontrast.config import UsageError, configure, read_config
from hypercontrast.data import parquet
from hypercontrast.data.transfer import locate

for extra in ("pyarrow", "safetensors", "yaml", "PIL"):
    pytest.importorskip(extra)

ROOT = Path(__file__).resolve().parents[1]


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def in_archive(payload):
    """The payload as `torch.save` writes: a pickle in a zip archive."""
    buffer = io.BytesIO()
    torch.save({"optimizer": payload}, buffer)
    return buffer.getvalue()


def with_escape(payload):
    """The same with a member that leads out of the archive."""
    buffer = io.BytesIO(in_archive(payload))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("../../escaped", "")
    return buffer.getvalue()


def saved_with(folder, name, content):
    made = save_checkpoint(folder, Checkpoint(1, {"w": torch.ones(3)}, {"epoch": 1}))
    (made / name).write_bytes(content)
    sealed(made)
    return lambda: warned_of(folder)


def config_of(folder, text):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(text)
    return folder / "config.yaml"


def cifar_archive(root, classes, content):
    folder = root / {10: "cifar-10-batches-py", 100: "cifar-100-python"}[classes]
    folder.mkdir(parents=True)
    batches = ["train", "test", "meta", "batches.meta", "test_batch", *(f"data_batch_{n}" for n in range(1, 6))]
    for name in batches:
        (folder / name).write_bytes(content)
    return lambda: data.load(f"cifar{classes}", root)


def food_list(root, line):
    folder = root / "food-101"
    (folder / "images").mkdir(parents=True)
    (folder / "meta").mkdir()
    (folder / "meta" / "classes.txt").write_text("..\n/\n")
    for split in ("train", "test"):
        (folder / "meta" / f"{split}.txt").write_text(f"{line}\n")
    return lambda: locate("food101", root)(0)


def matlab_lists(root, content):
    folder = root / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    for name in ("imagelabels.mat", "setid.mat"):
        (folder / name).write_bytes(content)
    return lambda: locate("flowers", root)(0)


def of_parquet(root, pictures, **options):
    write_parquet(root / "test.parquet", [encoded()] * 2, [0, 1])
    write_parquet(root / "train.parquet", pictures, [n % 2 for n in range(len(pictures))], **options)
    return lambda: data.load(f"parquet:{root}")


def attacks(root, marker, monkeypatch):
    """(name, what is done with the file, the error it must end in)."""
    payload, plain = Payload(marker), pickle.dumps(Payload(marker))
    tagged = f"run_dir: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{marker}]]\n"
    for n, content in enumerate([plain, pickle.dumps(payload, protocol=2), in_archive(payload), with_escape(payload)]):
        yield f"a pickle as state {n}", saved_with(root / f"state{n}", STATE, content), CheckpointError
        yield f"a pickle as weights {n}", saved_with(root / f"weights{n}", WEIGHTS, content), CheckpointError
    for n, (name, content, _) in enumerate(CHECKPOINTS):
        if name == WEIGHTS and content and b"dtype" in content:
            yield f"declared tensors {n}", saved_with(root / f"declared{n}", WEIGHTS, content), CheckpointError
    for classes in (10, 100):
        yield f"the archive of cifar{classes}", cifar_archive(root / f"{classes}", classes, plain), UsageError
    config = config_of(root / "tagged", tagged)
    yield "an object in config.yaml", lambda: read_config(config), UsageError
    for n, line in enumerate(("../../../etc/passwd", "/etc/passwd")):
        yield f"a list that leads elsewhere {n}", food_list(root / f"food{n}", line), UsageError
    if pytest.importorskip("scipy"):
        yield "a pickle as a Matlab list", matlab_lists(root / "mat", plain), UsageError
    for name, content, _ in PICTURES:
        folder = make_folder(root / f"picture {name}")
        first(folder).write_bytes(plain if name == "a pickle" else content)
        yield f"picture: {name}", lambda folder=folder: data.load(f"folder:{folder}"), UsageError
    yield "a pickle in Parquet", of_parquet(root / "pickled", [plain, plain]), UsageError
    path_alone = [{"bytes": None, "path": "/etc/passwd"}] * 2
    yield "a path in Parquet", rows_of_parquet(root / "paths", path_alone), UsageError
    # The bounds are in GiB: to meet them in a test they are lowered.
    monkeypatch.setattr(parquet, "IN_MEMORY_BYTES", 1 << 20)
    zeros = [bytes(1 << 20) + bytes([n]) for n in range(8)]
    yield "a bomb in Parquet", of_parquet(root / "bomb", zeros), UsageError
    yield "a repeated bomb in Parquet", of_parquet(root / "repeated", [bytes(1 << 19)] * 64), UsageError


def rows_of_parquet(root, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    root.mkdir(parents=True)
    for split in ("train", "test"):
        pq.write_table(pa.table({"image": pa.array(rows, kind), "label": [0, 1]}), root / f"{split}.parquet")
    return lambda: data.load(f"parquet:{root}")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_malicious_files(tmp_path, figure, monkeypatch, capsys):
    pytest.importorskip("torchvision")
    marker = tmp_path / "run"
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists(), "the payload works where something runs it"
    marker.unlink()

    failures, count = [], 0
    for name, act, error in attacks(tmp_path / "files", marker, monkeypatch):
        count += 1
        if wrong := refused(act, error, ""):
            failures.append(f"{name}: {wrong}")
    tagged = tmp_path / "files" / "tagged"
    (tagged / "metrics.jsonl").write_text('{"epoch": 1, "loss": 1.0}\n')
    for main, argv in ((report.main, [tagged]), (table.main, ["3", tagged]), (train.main, ["--resume", tagged])):
        count += 1
        if wrong := told(main, list(map(str, argv)), capsys, "must be readable YAML"):
            failures.append(f"{main.__module__} of a tagged config: {wrong}")
    # Names are looked up in registries, never imported.
    for setting in (
        {"model": "os.system"},
        {"model": "timm:hf-hub:x/y"},
        {"dataset": "os:system"},
        {"loss": "os.system"},
    ):
        count += 1
        with pytest.raises(UsageError, match=f"{next(iter(setting))} must be"):
            train.prepare(configure(**setting, run_dir=str(tmp_path / "new")))
    assert not failures, "\n".join(failures)
    ran = marker.exists() or (tmp_path.parent / "escaped").exists()
    assert not ran
    figure("R18", f"{count} of {count} malicious files and settings refused, {int(ran)} ran code")


EVIL = "\"><script>alert(1)</script><img src=x onerror=alert(1)>'</style></svg><!--"


def test_markup_in_a_page_is_text(tmp_path, figure):
    """In class names, in a run's folder, in names and values of settings, in names of metrics."""
    from test_report import Page, make_run

    name = EVIL.replace("/", "")  # which would be a folder of its own
    run = make_run(tmp_path / name, classes=3, class_names=[EVIL] * 3, dataset=EVIL, model=EVIL, **{EVIL: EVIL})
    line = json.dumps({"epoch": 4, "loss": 0.1, "accuracy": 0.5, EVIL: 1.0, "nc1": 0.1})
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    text = report.write_report([run, make_run(tmp_path / "b")]).read_text()
    page = Page(text)
    assert page.count("script") == 0
    assert all(not key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert all(
        source.startswith("data:")
        for tag, a in page.tags
        if tag in ("img", "image")
        for source in [a.get("src") or a["href"]]
    )
    assert "<!--" not in text
    assert "default-src 'none'" in text, "and were a script left, the page's policy would forbid it"
    assert EVIL in "".join(page.words)
    figure("R18", "markup in 6 kinds of names: 0 tags, 0 handlers in report.html")


# What could run or unpack anything: where in the source it stands, and why it may.
ALLOWED = {
    ("hypercontrast/checkpoint.py", "torch.load"): "weights_only=True, after the checksum",
    ("bench/buffer.py", "torch.load"): "weights_only=True, of the bench's own ranks",
    ("hypercontrast/config.py", "yaml.load"): "with a Loader that is a SafeLoader",
    ("hypercontrast/ddp_check.py", "pickle.loads"): "of the caller's own loss, in the processes it started",
    ("hypercontrast/_extension.py", "importlib.import_module"): "a constant",
    ("bench/__main__.py", "importlib.import_module"): "a name of SUBCOMMANDS",
    ("hypercontrast/cli.py", "importlib.import_module"): "a name of COMMANDS",
    ("hypercontrast/completion.py", "importlib.import_module"): "a name of COMMANDS",
    ("hypercontrast/doctor.py", "importlib.import_module"): "constants",
    (
        "hypercontrast/ddp_command.py",
        "importlib.import_module",
    ): "the caller's own loss, by its name on the command line",
}
WATCHED = {
    *(f"pickle.{name}" for name in ("load", "loads", "Unpickler")),
    *(f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load")),
    *(f"shutil.{name}" for name in ("unpack_archive",)),
    *(f"os.{name}" for name in ("system", "popen", "execv", "execvp", "spawnv")),
    "torch.load", "torch.jit.load", "torch.hub.load", "np.load", "numpy.load", "np.fromfile", "joblib.load",
    "marshal.load", "marshal.loads", "shelve.open", "dill.load", "dill.loads", "eval", "exec", "compile", "__import__",
    "importlib.import_module",
}  # fmt: skip
UNPACKERS = {"zipfile", "tarfile", "joblib", "dill", "cloudpickle", "marshal", "shelve"}


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in UNPACKERS:
                    yield f"import {alias.name}", node
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in {*UNPACKERS, "pickle"}:
            yield f"from {node.module}", node


def test_nothing_in_the_source_runs_what_it_reads(figure):
    found, files = set(), 0
    for folder in ("hypercontrast", "kernels", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            files += 1
            place = path.relative_to(ROOT).as_posix()
            for name, node in calls(ast.parse(path.read_text(encoding="utf-8"))):
                if name in WATCHED or name.startswith(("import ", "from ")):
                    found.add((place, name))
                keywords = {k.arg: ast.unparse(k.value) for k in getattr(node, "keywords", ())}
                assert keywords.get("shell", "False") == "False", place
                assert keywords.get("allow_pickle", "False") == "False", place
                if name == "torch.load":
                    assert keywords.get("weights_only") == "True", place
    assert files > 50
    assert found == set(ALLOWED)
    figure("R18", f"{files} source files: {len(found)} watched calls, each allowed by name, none on what a file says")
