"""What a training run is made of: one frozen dataclass, from which flags, recipes and config.yaml all come.

Precedence: defaults < recipe < config.yaml of a run being resumed < flags given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hypercontrast._checks import LEAST_TEMPERATURE, LONGEST_WAIT
from hypercontrast.output import encoding, on_terminal, say

RECIPES = Path(__file__).parent / "recipes"
# Settings a resumed run may change without becoming another run.
FREE_ON_RESUME = {
    "data_root", "recipe", "gpus", "cpu_ranks", "rank_timeout", "max_restarts", "backend", "workers", "compile",
    "checkpoint_every", "keep_checkpoints", "run_dir", "resume", "dry_run", "quiet", "json",
}  # fmt: skip


class UsageError(ValueError):
    """Something the person who started the run can put right; the message is one line that says what."""


@contextlib.contextmanager
def access(path: str | Path, how: Literal["read", "written"]) -> Iterator[None]:
    """What the system has against it becomes a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be {how}: {error.strerror}") from None


def holds(folder: str | Path, name: str) -> bool:
    """Whether a run's folder has this file. Raises UsageError where that cannot be seen."""
    with access(folder, "read"):
        try:
            return stat.S_ISREG(os.stat(Path(folder, name)).st_mode)
        except (FileNotFoundError, NotADirectoryError, ValueError):  # the last of a name with a NUL
            return False


@dataclass(frozen=True)
class Config:
    """Train a classifier on the unit hypersphere and watch its classes collapse into a simplex."""

    loss: Literal["ce", "normface", "ntce", "nonl", "scl", "etf-dr"] = "nonl"
    """What to minimise: cross-entropy, a prototype loss, SupCon over two views, or dot regression to a simplex ETF."""
    anchor: Literal["prototype", "sample", "both"] = "prototype"
    """What nonl contrasts: prototypes with samples (the paper's text), samples with prototypes (its code), or both."""
    dataset: str = "mnist5k"
    """mnist5k, cifar10, cifar100, imagenet100, imagenet1k, folder:PATH ({train,val}/CLASS/*.png) or parquet:PATH."""
    data_root: str = "data"
    """Folder that holds the named data sets; nothing is ever downloaded."""
    recipe: str = "none"
    """Named settings that flags override; auto takes DATASET-LOSS where there is one, none takes no recipe."""
    model: str = "convnet"
    """convnet, resnet18 to resnet152, vit_b_16, vit_l_16 or timm:NAME; ResNets take a 3x3 stem up to 64 pixels."""
    width: int = 64
    """Channels after a ResNet's stem; 64 is the usual network, a quarter of it costs a sixteenth."""
    neck: Literal["none", "linear", "bn"] = "none"
    """Layer after pooling; a signed one (linear, bn) puts the simplex ETF within the features' reach."""
    head: Literal["mlp", "linear", "none"] = "mlp"
    """Projection that scl trains, D->D->128 (mlp) or D->128 (linear); the other losses have none."""
    epochs: int = 8
    """Passes over the training set."""
    warmup_epochs: int = 1
    """Epochs over which the learning rate rises linearly to its peak; 0 starts there."""
    warmup_lr: float = 0.0
    """Learning rate that the warm-up starts from."""
    batch_size: int = 128
    """Largest global batch, over all ranks; every epoch is cut into equal batches of at most this many pictures."""
    lr: float = 0.2
    """Peak learning rate of SGD with momentum 0.9; a cosine takes it to a thousandth."""
    lr_per: int = 0
    """Pictures in a batch that --lr is meant for: the peak is lr * batch_size / lr_per; 0 takes --lr as it is."""
    weight_decay: float = 1e-4
    """L2 penalty on every parameter; 0 for none."""
    temperature: float = 0.2
    """Temperature τ of the prototype losses and scl; ce and etf-dr have none."""
    temperature_rule: Literal["fixed", "learned", "cosine"] = "fixed"
    """Keep τ, learn it from --temperature (at most 1) on, or take it along a cosine to --final-temperature."""
    final_temperature: float = 0.1
    """Where the cosine rule ends, and the least that the learned rule may come to."""
    seed: int = 42
    """Fixes initial weights, batches and augmentation."""
    imbalance: float = 1.0
    """Pictures of the smallest class over those of the largest, in training; 1 takes all there are."""
    imbalance_shape: Literal["exp", "step"] = "exp"
    """How class sizes fall under --imbalance: exponentially, or in one step halfway."""
    sampling: Literal["all", "sqrt", "balanced"] = "all"
    """Pictures of an epoch: each once, or classes drawn by the square root of their size, or all classes alike."""
    class_weights: Literal["none", "inverse"] = "none"
    """Weigh a sample by one over its class's size in ce and the prototype losses, or all samples alike."""
    gpus: int = 0
    """GPUs of this machine to train on, one rank each; 0 takes one if there is one, else the CPU."""
    cpu_ranks: int = 0
    """Ranks on the CPU, over Gloo; 0 leaves the choice to --gpus."""
    rank_timeout: int = 600
    """Seconds that a rank waits for another before the run ends."""
    max_restarts: int = 0
    """Times that all ranks start again from the last checkpoint, after one of them died."""
    sync_bn: bool = False
    """Batch norm over the batches of all GPUs; on one GPU or on the CPU there is nothing to join."""
    backend: Literal["auto", "reference", "blockwise", "triton"] = "auto"
    """Implementation of the prototype losses and scl."""
    queue: int = 0
    """Past features that ntce, nonl and scl contrast too, over all ranks; 0 for none."""
    accumulate: int = 1
    """Chunks a batch is encoded in, for the memory of one; the step stays the batch's (but batch norm sees chunks)."""
    limit: int = 0
    """Use at most this many training and this many validation pictures, evenly from every class; 0 for all."""
    evaluate_every: int = 1
    """Epochs between measurements of accuracy and neural collapse; the last epoch is always measured."""
    checkpoint_every: int = 0
    """Steps between checkpoints inside an epoch, for epochs too long to repeat; 0 saves after measured epochs only."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept; the one of the epoch with the best accuracy always is."""
    workers: int = 8
    """Processes a rank that decode pictures too large to live on the device; 0 decodes in the rank itself."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the network and the augmentation; auto does on a GPU."""
    run_dir: str = ""
    """Folder of the run; by default runs/RECIPE-TIME, or runs/DATASET-LOSS-TIME without a recipe."""
    resume: str = "none"
    """auto continues the run in --run-dir if there is one, PATH the run in that folder, none starts a new one."""
    dry_run: bool = False
    """Print batch, negatives, steps, schedule, memory and time, then stop."""
    quiet: bool = False
    """Print the final line only."""
    json: bool = False
    """Print the result only, as JSON: folder, report and the last epoch's line of metrics.jsonl."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), hint))
        self._check()

    def _check(self) -> None:
        for name in (
            "epochs",
            "batch_size",
            "accumulate",
            "evaluate_every",
            "keep_checkpoints",
            "width",
            "rank_timeout",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("rank_timeout", self.rank_timeout <= LONGEST_WAIT, f"at most {LONGEST_WAIT}")
        for name in ("lr", "temperature", "final_temperature"):
            self._require(name, 0 < getattr(self, name) < math.inf, "positive and finite")
        for name in ("temperature", "final_temperature"):
            self._require(name, getattr(self, name) >= LEAST_TEMPERATURE, f"at least {LEAST_TEMPERATURE:.1e}")
        for name in ("weight_decay", "warmup_lr"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "finite and not negative")
        for name in (
            "gpus",
            "cpu_ranks",
            "queue",
            "limit",
            "seed",
            "lr_per",
            "checkpoint_every",
            "workers",
            "max_restarts",
        ):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._require("warmup_epochs", 0 <= self.warmup_epochs <= self.epochs, "between 0 and epochs")
        self._require("imbalance", 0 < self.imbalance <= 1, "above 0 and at most 1")
        if self.loss != "nonl":
            self._require("anchor", self.anchor == "prototype", f"prototype with loss {self.loss}")
        if self.loss in ("ce", "etf-dr"):
            self._require("temperature_rule", self.temperature_rule == "fixed", f"fixed with loss {self.loss}")
        if self.temperature_rule == "learned":
            within = f"between final_temperature={self.final_temperature:g} and 1 where it is learned"
            self._require("temperature", self.final_temperature <= self.temperature <= 1, within)
        if self.loss not in ("ntce", "nonl", "scl"):
            self._require("queue", self.queue == 0, f"0 with loss {self.loss}")
        if self.anchor == "sample":
            self._require("queue", self.queue == 0, "0 with anchor sample, which contrasts prototypes alone")
        if self.loss in ("scl", "etf-dr"):
            self._require("class_weights", self.class_weights == "none", f"none with loss {self.loss}")
        if self.loss == "scl":
            self._require("neck", self.neck == "none", "none with loss scl, which has a --head")
        if self.dry_run:
            self._require("json", not self.json, "false with dry_run, which prints a text")
        if self.gpus and self.cpu_ranks:
            raise UsageError(f"gpus must be 0 with cpu_ranks={self.cpu_ranks}, got {self.gpus}")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UsageError(f"{name} must be {rule}, got {getattr(self, name)}")

    @property
    def ranks(self) -> int:
        """Ranks to start on this machine."""
        return max(self.gpus, self.cpu_ranks, 1)

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up."""
        return self.lr * self.batch_size / self.lr_per if self.lr_per else self.lr


class _Draft(Config):
    """What flags say of the recipe or run they go on top of: only with that below them need they fit together."""

    def _check(self) -> None:
        pass


def _checked(name: str, value: Any, hint: Any) -> Any:
    """The value in its field's type, for YAML and callers are as untyped as they like."""
    if get_origin(hint) is Literal:
        options = get_args(hint)
        if value not in options:
            raise UsageError(f"{name} must be one of {', '.join(options)}, got {value!r}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UsageError(f"{name} must be {hint.__name__}, got {value!r}")
    if hint is int and not -(2**63) <= value < 2**63:
        raise UsageError(f"{name} must fit 64 bits, got {value}")
    if hint is str and not value.isprintable():  # a NUL ends paths, a new line splits the one line of an error
        raise UsageError(f"{name} must be printable text, got {value!r}")
    return value


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def configure(*, recipe: str = "auto", **flags: Any) -> Config:
    """The config of a recipe with `flags` on top, as the command line makes it. Raises UsageError."""
    return dataclasses.replace(_base(_Draft(**(flags | {"recipe": recipe}))), **flags)


def parse(argv: Sequence[str], prog: str = "python -m hypercontrast.train") -> Config:
    """The config that a command line asks for. Raises UsageError in one line; `--help` prints and exits."""
    draft = _parse_flags(argv, _Draft(recipe="auto"), prog)
    base = _base(draft)
    config = _parse_flags(argv, base, prog)
    return dataclasses.replace(config, recipe=base.recipe)


def _base(draft: Config) -> Config:
    """What flags start from: the run to resume, the draft's recipe, or the defaults."""
    folder = resume_folder(draft)
    if folder and holds(folder, "config.yaml"):
        saved = Path(folder, "config.yaml")
        run = read_config(saved)
        if draft.recipe not in ("auto", run.recipe):  # its settings would be passed over
            raise UsageError(f"recipe must stay {run.recipe} to resume the run in {saved.parent}, got {draft.recipe}")
        # How to run it is this call's business, not the run's.
        return dataclasses.replace(run, run_dir=str(saved.parent), quiet=False, json=False, dry_run=False)
    name = draft.recipe
    if name == "auto":
        name = f"{draft.dataset}-{draft.loss}"
        name = name if name in recipe_names() else "none"
    return Config() if name == "none" else read_recipe(name)


def resume_folder(config: Config) -> str:
    """The folder that `--resume` means; empty where a new run is wanted or no folder was named."""
    return {"none": "", "auto": config.run_dir}.get(config.resume, config.resume)


def read_recipe(name: str) -> Config:
    """A recipe by its name: its own settings on those of the recipe it names as `base`."""
    if name not in (names := recipe_names()):
        close = "".join(f", close to {match}" for match in difflib.get_close_matches(name, names, 1))
        raise UsageError(f"recipe must be auto, none or one of the {len(names)} in {RECIPES}, got {name!r}{close}")
    return _config_of({**_recipe_settings(name), "recipe": name}, RECIPES / f"{name}.yaml")


def _recipe_settings(name: str) -> dict[str, Any]:
    settings = _read_settings(RECIPES / f"{name}.yaml")
    base = settings.pop("base", None)
    return {**_recipe_settings(base), **settings} if base else settings


def read_config(path: Path) -> Config:
    """A config from a YAML mapping: plain scalars only, an unknown key is an error."""
    return _config_of(_read_settings(path), path)


def run_config(run: str) -> Config:
    """The config a run was trained with. Raises UsageError if the folder holds no run, or cannot be read."""
    if not holds(run, "config.yaml"):
        raise UsageError(f"RUN must be the folder of a run, with a config.yaml, got {run}")
    return read_config(Path(run, "config.yaml"))


def _read_settings(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold a mapping of settings, got {type(values).__name__}")
    return values


def read_yaml(path: Path) -> Any:
    """Plain YAML: scalars, lists and mappings; no tag makes an object, no key stands twice. Raises UsageError."""
    yaml = _yaml()

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            if twice := [key for n, key in enumerate(keys) if key in keys[:n]]:
                raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} stands there twice", node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    # A scalar that is not what its tag says fails in Python's own conversions; nesting ends at the interpreter's depth.
    except (yaml.YAMLError, OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} must be readable YAML: {' '.join(str(error).split())}") from None


def _config_of(values: dict[str, Any], path: Path) -> Config:
    known = {field.name for field in dataclasses.fields(Config)}
    if unknown := sorted(str(key) for key in values if key not in known):
        raise UsageError(f"{path} must hold known settings only, got {', '.join(unknown)}")
    try:
        return Config(**values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def to_yaml(config: Config) -> str:
    return _yaml().safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise UsageError("recipes and config.yaml need PyYAML: pip install 'hypercontrast[train]'") from None
    return yaml


def _parse_flags(argv: Sequence[str], default: Config, prog: str) -> Config:
    try:
        import tyro
    except ImportError:
        raise UsageError("the command line needs tyro: pip install 'hypercontrast[train]'") from None
    complaint = io.StringIO()
    # tyro looks at the output's encoding for how to frame its page, and for colours at the terminal alone.
    page = io.TextIOWrapper(io.BytesIO(), encoding=encoding(sys.stdout), errors="replace")
    coloured = on_terminal() and not os.environ.get("NO_COLOR")
    page.isatty = lambda: coloured  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(page), _wide_enough():
            return tyro.cli(type(default), prog=prog, description=Config.__doc__, args=list(argv), default=default)
    except SystemExit as stop:
        if stop.code:
            raise UsageError(_one_line(complaint.getvalue())) from None
        page.seek(0)
        if text := page.read().rstrip():
            say(text)
        raise


@contextlib.contextmanager
def _wide_enough() -> Iterator[None]:
    """A terminal as it is, or of 40 columns: below, tyro sets a letter a line, and below five it never ends."""
    before, columns = os.environ.get("COLUMNS"), max(shutil.get_terminal_size().columns, 40)
    os.environ["COLUMNS"] = str(columns)
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _one_line(box: str) -> str:
    """The sentence inside tyro's frame, drawn in Unicode or ASCII: title, rule, sentence, rule, a pointer to --help."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    blocks = re.split(r"[─-]{3,}|Argument helptext:", re.sub(r"[│╭╮╰╯|]", " ", plain))
    sentences = [" ".join(block.split()) for block in blocks if block.strip(" ─-\n")]
    return re.sub(r"^Error parsing (Config|_Draft): ", "", sentences[min(1, len(sentences) - 1)])
