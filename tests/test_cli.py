"""The command `hypercontrast`: what it dispatches, prints and completes, and its exit codes."""

import importlib
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from runs import as_from_a_prompt

from hypercontrast import __version__ as version
from hypercontrast import cli, completion, config, demo, output, progress, transfer

ROOT = Path(__file__).parents[1]
TIMEOUT = 120
STYLE = re.compile(r"\x1b\[[0-9;]*m")
COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?3[0-8][0-9;]*m")
FAST = ["--limit", "40", "--epochs", "1", "--batch-size", "20"]


def started(*words, cwd=ROOT, environment=None, **streams):
    return subprocess.Popen(
        [sys.executable, "-m", "hypercontrast", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **(environment or {})},
        preexec_fn=as_from_a_prompt,
        **streams,
    )


def command(*words, cwd=ROOT):
    """Exit code, output and messages of the command, run to its end."""
    process = started(*words, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate(timeout=TIMEOUT)
    return process.returncode, out, err


def test_help_and_version(capsys):
    for words in ([], ["--help"], ["-h"]):
        assert cli.main(words) == 0
        text = capsys.readouterr().out
        for name, (_, does) in cli.COMMANDS.items():
            assert re.search(rf"^  {name} +{re.escape(does)}$", text, flags=re.MULTILINE)
        assert cli.EXIT_CODES.splitlines()[2] in text
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"hypercontrast {version}\n"


@pytest.mark.parametrize("word", ["trian", "--quiet", ""])
def test_an_unknown_command(word, capsys):
    assert cli.main([word]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"error: command must be one of {', '.join(cli.COMMANDS)}, got {word!r}\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/venv/bin/hypercontrast"])
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert STYLE.sub("", capsys.readouterr().out).startswith(f"usage: hypercontrast {name} [-h]")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_mistake_is_one_line(name, capsys):
    assert cli.main([name, "--no-such-flag"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("called", "typed"),
    [
        ("/venv/bin/hypercontrast", "hypercontrast train"),
        ("/checkout/hypercontrast/__main__.py", "python -m hypercontrast train"),
        ("/checkout/hypercontrast/demo.py", "python -m hypercontrast.train"),
    ],
)
def test_it_names_commands_as_it_was_called(called, typed, monkeypatch):
    monkeypatch.setattr(progress, "python", lambda: "python")
    monkeypatch.setattr(sys, "argv", [called])
    assert progress.command("train") == typed


# Results alone, and as JSON.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, and the JSON that its training printed."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    code, out, err = command("train", *FAST, "--run-dir", str(folder), "--json")
    assert code == 0, err
    return folder, json.loads(out)


def test_json_of_training(run):
    folder, result = run
    assert result["run_dir"] == str(folder)
    assert Path(result["report"]).is_file()
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert "accuracy" in last
    assert last.items() <= result.items()


def test_json_of_a_dry_run(capsys):
    assert cli.main(["train", "--dry-run", "--json"]) == 2
    assert capsys.readouterr().err == "error: json must be false with dry_run, which prints a text, got True\n"


def test_evaluation(run, capsys):
    folder, _ = run
    assert cli.main(["evaluate", str(folder), "--prototypes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "evaluation.json").read_text())
    assert cli.main(["evaluate", str(folder), "--prototypes", "--quiet"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_json_of_a_table(run, capsys):
    folder, _ = run
    assert cli.main(["table", "1", str(folder), "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert {record["table"] for record in records} == {"Table 1"}
    first = records[0]
    assert isinstance(first["paper"], float)
    assert first["ours"] == []
    assert {"method", "data", "column", "state", "note", "stand_in"} <= first.keys()


def test_json_of_a_figure(run, tmp_path, capsys):
    folder, _ = run
    file = tmp_path / "figure2.svg"
    assert cli.main(["table", "figure2", str(folder), "--output", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"figure": str(file)}
    assert file.is_file()


def test_transfer_prints_its_table_or_json(run, capsys, monkeypatch):
    folder, _ = run
    result = {"metric": "top-1", "value": 0.5, "l2": 0.1, "train": 8, "test": 4, "damaged": 0}
    record = {"epoch": 1, "results": {"cifar10": result}}
    seen = []
    monkeypatch.setattr(transfer, "transfer", lambda options: seen.append(options.quiet) or record)
    assert cli.main(["transfer", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == record
    assert cli.main(["transfer", str(folder), "--quiet"]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["data", "set", "metric", "value", "l2", "train", "test", "damaged"]
    assert line.split() == ["cifar10", "top-1", "50.00%", "1.0e-01", "8", "4", "0"]
    assert cli.main(["transfer", str(folder)]) == 0
    assert capsys.readouterr().out == ""  # its lines come while it works
    assert seen == [True, True, False]


# check-ddp, with losses of the folder that it is called in.

LOSSES = """
import torch
import hypercontrast as hc

def exact(features, labels):
    return hc.supcon_loss(features, labels)

class Local(torch.nn.Module):
    def forward(self, features, labels):
        return hc.supcon_loss(features, labels, group=None)

def broken(features, labels):
    raise RuntimeError("no such luck")
"""


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("exact", 0, "exact: DDP on 2 ranks gives the gradient of the whole batch"),
        pytest.param("Local", 1, "wrong: not the direction of the whole batch's gradient", marks=pytest.mark.slow),
        pytest.param("broken", 1, "no such luck", marks=pytest.mark.slow),
        ("absent", 2, "loss must name something that can be imported, got 'mine:absent'"),
    ],
)
def test_check_ddp(name, code, says, tmp_path):
    (tmp_path / "mine.py").write_text(LOSSES)
    found, out, err = command("check-ddp", f"mine:{name}", cwd=tmp_path)
    assert found == code, err
    said, silent = (out, err) if name in ("exact", "Local") else (err, out)
    assert says in said
    assert (said.count("\n"), silent) == (1, "")


@pytest.mark.slow
def test_json_of_check_ddp(tmp_path):
    (tmp_path / "mine.py").write_text(LOSSES)
    code, out, _ = command("check-ddp", "mine:exact", "--json", cwd=tmp_path)
    verdict = json.loads(out)
    assert (code, verdict["kind"], len(verdict["losses"])) == (0, "exact", 2)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mine"], "loss must be MODULE:NAME, got 'mine'"),
        (["torch:no.such"], "loss must name something that can be imported"),
        (["torch:pi"], "loss_fn must be a function or a module, got float"),
        (["hypercontrast:SupConLoss", "--world-size", "1"], "world_size must be at least 2, got 1"),
        (["hypercontrast:SupConLoss", "--timeout", "0"], "timeout must be positive and finite, got 0.0"),
    ],
)
def test_bad_calls_of_check_ddp(words, says, capsys):
    assert cli.main(["check-ddp", *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {says}")
    assert printed.err.count("\n") == 1


# Ctrl-C.


def interrupted(*words, cwd, when):
    """Exit code, output and messages of a command that gets SIGINT once `when` is true."""
    process = started(*words, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + TIMEOUT
    while not when() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    return process.returncode, out, err


def test_ctrl_c_in_training_saves_and_says_where(tmp_path):
    flags = ["--limit", "1000", "--epochs", "200", "--run-dir", "run", "--quiet"]
    code, out, err = interrupted("train", *flags, cwd=tmp_path, when=(tmp_path / "run" / "metrics.jsonl").exists)
    assert (code, out) == (130, "")
    assert re.fullmatch(r"error: interrupted; .*run.*; to continue: .* -m hypercontrast train --resume run\n", err)


def test_ctrl_c_in_check_ddp_ends_the_ranks(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import os, time\nfrom pathlib import Path\n"
        "def loss(features, labels):\n    Path(f'started-{os.getpid()}').touch()\n    time.sleep(600)\n"
    )
    ranks = lambda: [int(path.name.partition("-")[2]) for path in tmp_path.glob("started-*")]  # noqa: E731
    code, out, err = interrupted("check-ddp", "slow:loss", cwd=tmp_path, when=lambda: len(ranks()) == 3)
    assert (code, out, err) == (130, "", "error: interrupted; the ranks were ended\n")
    assert [rank for rank in ranks() if Path(f"/proc/{rank}").exists()] == []


@pytest.mark.parametrize(
    ("module", "words", "work"),
    [
        ("report", ["RUN"], "write_report"),
        ("table", ["1"], "read_groups"),
        ("evaluate", ["RUN"], "evaluate"),
        ("transfer", ["RUN"], "transfer"),
        ("corruptions", ["RUN"], "measure"),
        ("demo", [], "run"),
        ("doctor", [], "check"),
        ("ddp_command", ["torch:add"], "_named"),
    ],
)
def test_ctrl_c_anywhere_is_one_line(module, words, work, monkeypatch, capsys):
    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    command = importlib.import_module(f"hypercontrast.{module}")
    monkeypatch.setattr(command, work, stopped)
    assert command.main(words) == 130
    error = capsys.readouterr().err
    assert error.startswith("error: interrupted")
    assert error.count("\n") == 1


def test_ctrl_c_after_the_last_epoch_leads_to_the_report(tmp_path, monkeypatch, capsys):
    def stopped(run_dirs):
        raise KeyboardInterrupt

    train = importlib.import_module("hypercontrast.train")
    monkeypatch.setattr(train, "write_report", stopped)
    assert train.main([*FAST, "--run-dir", str(tmp_path / "run")]) == 130
    error = capsys.readouterr().err
    assert "holds a finished run; for its report: " in error
    assert "--resume" not in error  # which is refused


# Terminals and pipes.


def on_a_terminal(*words, cwd, environment=None, code=0):
    """What a command writes on a terminal."""
    ours, theirs = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    process = started(*words, cwd=cwd, environment={"TERM": "xterm", **(environment or {})}, **streams)
    os.close(theirs)
    parts = []

    def listen():
        try:
            while part := os.read(ours, 65536):
                parts.append(part)
        except OSError:  # so a terminal ends when nobody writes to it any more
            pass

    listener = threading.Thread(target=listen)
    listener.start()
    assert process.wait(TIMEOUT) == code
    listener.join(TIMEOUT)
    os.close(ours)
    return b"".join(parts).decode()


def test_bars_and_colours_are_for_terminals(tmp_path):
    shown = on_a_terminal("train", *FAST, "--run-dir", "one", cwd=tmp_path)
    assert "epoch 1/1" in STYLE.sub("", shown)
    assert COLOUR.search(shown)
    plain = on_a_terminal("train", *FAST, "--run-dir", "two", cwd=tmp_path, environment={"NO_COLOR": "1"})
    assert "epoch 1/1" in STYLE.sub("", plain)
    assert not COLOUR.search(plain)
    code, out, err = command("train", *FAST, "--run-dir", "three", cwd=tmp_path)
    assert (code, "\x1b" in out + err) == (0, False)
    assert [line.split(" ")[0] for line in out.splitlines()] == ["epoch", "three:"]


def test_a_mistake_on_a_terminal_is_one_plain_line():
    shown = on_a_terminal("train", "--loss", "hinge", cwd=ROOT, code=2)
    assert re.fullmatch(r"error: [^\x1b\r\n]*invalid choice 'hinge'[^\x1b\r\n]*\r\n", shown)


def test_help_on_a_narrow_terminal_is_that_of_40_columns(monkeypatch, capsys):
    """In fewer than five the help of training never ended."""
    pages = []
    for columns in ("40", "20"):
        monkeypatch.setenv("COLUMNS", columns)
        with pytest.raises(SystemExit):
            cli.main(["train", "--help"])
        assert os.environ["COLUMNS"] == columns
        pages.append(capsys.readouterr().out)
    assert pages[0] == pages[1]


def test_help_has_colours_on_a_terminal_that_wants_them(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for no_color, coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        with pytest.raises(SystemExit):
            cli.main(["train", "--help"])
        shown = capsys.readouterr().out
        assert "--temperature" in shown
        assert bool(STYLE.search(shown)) == coloured


def test_nobody_reads_the_output(tmp_path):
    """As with `| head -1`: what is to be done is done, without a word."""
    train = ["train", *FAST, "--run-dir", "run"]
    calls = {tuple(words): None for words in (train, ["train", "--help"], ["doctor", "--help"], ["table", "all"])}
    for words in calls:
        calls[words] = started(*words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        calls[words].stdout.close()
    for words, process in calls.items():
        assert (process.stderr.read(), process.wait(TIMEOUT)) == ("", 0), words
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_full_disk_behind_the_output_is_told_once(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert [cli.main([word]) for word in ("--help", "--version")] == [0, 0]
    assert capsys.readouterr().err == "standard output ends here: No space left on device\n"


def test_a_full_disk_behind_all_that_is_said_changes_no_exit_code(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", full)
        assert cli.main(["--help"]) == 0
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert cli.main(["no-such-command"]) == 2


def test_a_closed_terminal_ends_no_work(monkeypatch, capsys):
    pytest.importorskip("rich")
    ours, theirs = pty.openpty()
    with open(theirs, "w", encoding="latin-1") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        with progress.Progress(2, 1) as bar:
            bar.say("1–2")
            shown = b""
            while b"1?2" not in shown:
                shown += os.read(ours, 65536)
            os.close(ours)
            bar.say("nobody reads this")
            bar.start_epoch(2)
        with demo._table() as table:
            table.add(demo.COLUMNS)
    assert capsys.readouterr().err == ""


def test_a_closed_output_is_written_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    assert config.parse(["--loss", "ce"]).loss == "ce"
    with progress.Progress(1, 1) as bar:
        bar.say("a line")
    with demo._table() as table:
        table.add(demo.COLUMNS)
    assert capsys.readouterr().err == ""


def test_a_closed_error_stream_is_written_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["no-such-command"]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_letters_that_an_encoding_lacks_are_question_marks(encoding, terminal, monkeypatch):
    written = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    written.isatty = lambda: terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", written)
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    output.say("1–2")
    text = written.buffer.getvalue().decode(encoding)
    assert bool(STYLE.search(text)) == terminal
    assert "Temperature ? of the prototype losses" in STYLE.sub("", text)
    assert text.count("?") < 10  # the frame is drawn in letters that there are
    assert text.endswith("1?2\n")


def test_evaluation_shows_what_it_is_at(run):
    folder, _ = run
    shown = STYLE.sub("", on_a_terminal("evaluate", str(folder), "--prototypes", "--linear-probe", cwd=ROOT))
    assert "linear probe" in shown
    assert re.search(r"epoch \d+/20", shown)


# Completion.


@pytest.fixture
def shtab():
    pytest.importorskip("shtab")
    if not shutil.which("bash"):
        pytest.skip("needs bash")


def completed(*words):
    """What bash offers for the last of these words."""
    listed = " ".join(f"'{word}'" for word in words)
    offer = f"COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; _shtab_hypercontrast; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(
        ["bash", "--norc", "-c", f"{completion.script('bash')}\n{offer}"],
        capture_output=True, text=True, timeout=TIMEOUT, check=True, cwd=ROOT,
    )  # fmt: skip
    return done.stdout.split()


@pytest.mark.usefixtures("shtab")
def test_completion_in_bash():
    assert completed("hypercontrast", "t") == ["train", "transfer", "table"]
    assert completed("hypercontrast", "train", "--temp") == ["--temperature", "--temperature-rule"]
    assert completed("hypercontrast", "train", "--loss", "n") == ["normface", "ntce", "nonl"]
    assert "cifar10-nonl" in completed("hypercontrast", "train", "--recipe", "cifar10-")
    assert completed("hypercontrast", "train", "--no-s") == ["--no-sync-bn"]
    assert completed("hypercontrast", "evaluate", "--lin") == ["--linear-probe"]
    assert completed("hypercontrast", "completion", "z") == ["zsh"]
    for words in (["report"], ["evaluate"], ["train", "--run-dir"], ["train", "--data-root"], ["train", "--resume"]):
        assert "docs" in [folder.rstrip("/") for folder in completed("hypercontrast", *words, "doc")]
    assert completed("hypercontrast", "report", "--output", "READ") == ["README.md"]


@pytest.mark.usefixtures("shtab")
@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_of_every_command(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert [name for name in cli.COMMANDS if name not in script] == []


@pytest.mark.usefixtures("shtab")
def test_completion_knows_the_flags_of_training(capsys):
    with pytest.raises(SystemExit):
        config.parse(["--help"])
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", STYLE.sub("", capsys.readouterr().out)))
    offered = set(completed("hypercontrast", "train", "--"))
    assert len(offered) > 40
    assert offered <= flags | {"--help"}


def test_completion_without_shtab(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == "error: completion needs shtab: pip install 'hypercontrast[train]'\n"
