"""A miniseries: base models of several depths, to see how bits per byte fall with compute.

Each run is `base_train` with a base directory of its own, so it touches no other model or report.
"""

import dataclasses
import json
import logging
import math
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.cli import directory_name, flag, parse
from nanochat_jax.errors import UsageError
from nanochat_jax.files import lock_file, make_directory, parse_json, write_file
from nanochat_jax.metrics import read_metrics
from nanochat_jax.model.size import flops_per_token, num_scaling_params, param_counts
from nanochat_jax.paths import DATA_DIRS, Paths
from nanochat_jax.report.sections import log_section
from nanochat_jax.report.series import COLUMNS, STAGE, Row, by_budget, optimum, write_series
from nanochat_jax.speedrun.recipes import SMALL, read_recipe
from nanochat_jax.speedrun.runner import call, headline
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train.pretrain import BaseTrainConfig, model_config, recipe

log = logging.getLogger(__name__)

CHOSEN = ("depth", "target_flops", "model_tag", "resume", "resume_from_step", "fresh")
GROUPS = ("matrices", "lm_head", "wte", "value_embeds", "scalars")  # all others are scalars


def numbers(text: str) -> list[float]:
    """The numbers of "4,6,8" or "1e15,3e15"; ValueError if one is not positive or repeated."""
    values = [float(part) for part in text.split(",")]
    if not all(0 < value < math.inf for value in values) or len({*values}) < len(values):
        raise ValueError(f"{text!r}: expected different positive numbers, separated by commas")
    return values


def depths_of(text: str) -> list[int]:
    """The depths of "4,6,8"; ValueError if one is not a whole number from 1 to 1000."""
    if any(depth != int(depth) or depth > 1000 for depth in numbers(text)):
        raise ValueError(f"{text!r}: expected depths from 1 to 1000, separated by commas")
    return [int(depth) for depth in numbers(text)]


@dataclass(frozen=True, kw_only=True)
class MiniseriesConfig:
    depths: str = flag("4,6,8", "depths to train, separated by commas", check=depths_of)
    flops: str | None = flag(
        None,
        "training FLOPs, separated by commas: every depth is trained with each of them; default: "
        "as many steps as the recipe gives each depth",
        check=numbers,
    )
    name: str = flag("series", "name of the directory under miniseries/", check=directory_name)
    flags: str | None = flag(
        None,
        "other flags of base_train for all models, as one word such as '--max-seq-len 512'; "
        "default: none, on the embedded corpus those of the small preset",
    )


@dataclass(frozen=True)
class Model:
    """One model of the series."""

    depth: int
    budget: float | None  # training FLOPs; None: the recipe's
    flags: tuple[str, ...]

    @property
    def tag(self) -> str:
        return f"d{self.depth}" + (f"_{self.budget:g}".replace("+", "") if self.budget else "")

    @property
    def arguments(self) -> list[str]:
        budget = ["--target-flops", f"{self.budget:g}"] if self.budget else []
        return ["--depth", str(self.depth), *budget, *self.flags, "--model-tag", self.tag]

    def row(self, directory: Path, vocab_size: int) -> Row | None:
        """The model's row of the CSV; None unless its last step was evaluated."""
        config = parse(BaseTrainConfig, self.arguments, prog="base_train", description=None)
        shape, reference = model_config(config, vocab_size)
        plan = recipe(config, shape, reference)
        path = directory / "base_checkpoints" / self.tag / "metrics.jsonl"
        lines = read_metrics(path) if path.exists() else []
        last = [line for line in lines if line["step"] == plan.num_iterations and "val_bpb" in line]
        if not last:
            return None
        counts = dict.fromkeys(GROUPS, 0)
        for group, count in param_counts(shape).items():
            counts[group if group in GROUPS else "scalars"] += count
        scaling = num_scaling_params(shape)
        values = (
            *(self.depth, self.budget or math.nan, plan.num_iterations, plan.total_tokens),
            *(scaling, plan.total_tokens / scaling, flops_per_token(shape) * plan.total_tokens),
            *(last[-1]["total_training_time"], last[-1]["val_bpb"], last[-1].get("core", math.nan)),
        )
        return {**dict(zip(COLUMNS, map(float, values), strict=True)), **counts}


def train_series(config: MiniseriesConfig) -> int:
    """Train what is missing of the series, then write its CSV and its section of the report.

    Returns the exit code of the first run that fails, or 0.
    """
    paths = Paths.from_env()
    if paths.bucket:
        raise UsageError(
            "a miniseries keeps its checkpoints on one machine: unset NANOCHAT_CHECKPOINT_DIR"
        )
    tokenizer = Tokenizer.load(paths.tokenizer)
    models = plan_series(config, paths)
    directory = paths.base / "miniseries" / config.name
    make_directory(directory)
    with lock_file(directory / ".lock", str(directory), "wait for it or stop it"):
        _claim(directory, models[0].flags)
        _link(directory, paths)
        rows: list[Row] = []
        for number, model in enumerate(models, 1):
            label = f"[{number}/{len(models)}] {model.tag}"
            row = model.row(directory, tokenizer.vocab_size)
            if row is None:
                headline(label)
                if code := _train(model, directory):
                    return code
                row = model.row(directory, tokenizer.vocab_size)
                assert row is not None
            else:
                headline(f"{label}: already finished")
            rows.append(row)
        write_series(directory / "series.csv", rows)
    _report(config, paths, directory / "series.csv", rows)
    return 0


def plan_series(config: MiniseriesConfig, paths: Paths) -> list[Model]:
    """The models in the order of training. Raises `UsageError` for an invalid flag."""
    flags = tuple(shlex.split(config.flags)) if config.flags else ()
    if config.flags is None and paths.find_data() == "embedded":
        flags = _small_flags()
    budgets = numbers(config.flops) if config.flops else [None]
    given = parse(BaseTrainConfig, flags, prog="base_train", description=None)
    chosen = (*CHOSEN, "num_iterations") if config.flops else CHOSEN
    for field in dataclasses.fields(given):
        if field.name in chosen and getattr(given, field.name) != field.default:
            raise UsageError(f"`flags`: the series decides `{field.name}`: leave it out")
    depths = depths_of(config.depths)
    return [Model(depth, budget, flags) for budget in budgets for depth in depths]


def _small_flags() -> tuple[str, ...]:
    """Flags of `base_train` in the small preset, without its size and evaluations in between."""
    command = read_recipe(SMALL, depth=1)["base_train"][1:]
    pairs = dict(zip(command[::2], command[1::2], strict=True))
    for name in ("--depth", "--model-tag", "--num-iterations"):
        del pairs[name]
    pairs |= {"--eval-every": "-1", "--device-batch-size": "16"}
    return tuple(word for pair in pairs.items() for word in pair)


def _claim(directory: Path, flags: tuple[str, ...]) -> None:
    """Record the flags of the series. Raises `UsageError` if it was begun with others."""
    record = directory / "flags.json"
    if record.exists() and (before := parse_json(record.read_bytes())) != list(flags):
        raise UsageError(
            f"{directory} was begun with `flags={shlex.join(before)}`: use them, or another `name`"
        )
    write_file(record, json.dumps(flags) + "\n")


def _link(directory: Path, paths: Paths) -> None:
    """Make the series' directory a base directory with the tokenizer and corpora of `paths`."""
    shared = [paths.tokenizer, paths.eval_bundle, paths.compile_cache, *map(paths.data, DATA_DIRS)]
    for source in shared:
        link = directory / source.name
        if source.exists() and not link.is_symlink():
            link.symlink_to(source)


def _train(model: Model, directory: Path) -> int:
    command = [sys.executable, "-m", "scripts.base_train", *model.arguments, "--resume"]
    code = call(command, os.environ | {"NANOCHAT_BASE_DIR": str(directory)})
    if code:
        print(
            f"error: {model.tag} ended with exit code {code}; run the same command again to "
            "continue from here",
            file=sys.stderr,
        )
    return code


def _report(config: MiniseriesConfig, paths: Paths, path: Path, rows: list[Row]) -> None:
    """Log the series' section, and print its table."""
    make_directory(paths.report)
    table = ["| model | tokens | tokens per parameter | FLOPs | seconds | bits per byte |"]
    table += ["|---|---|---|---|---|---|"]
    table += [
        f"| d{row['depth']:.0f} | {row['tokens']:,.0f} | {row['tokens_per_parameter']:.3g} "
        f"| {row['flops']:.3g} | {row['seconds']:,.0f} | {row['val_bpb']:.4f} |"
        for row in rows
    ]
    best = {}
    for budget, models in by_budget(rows).items():
        ratio = optimum(models)
        best[f"optimal tokens per parameter at {budget:.3g} FLOPs"] = (
            f"{ratio:.3g}" if ratio else "outside of the series, or fewer than three depths"
        )
    print("\n".join([*table, *(f"{name}: {value}" for name, value in best.items()), str(path)]))
    log_section(
        paths.report,
        "Miniseries",
        [dataclasses.asdict(config), "\n".join(table), best],
        stage=STAGE,
        results={"models": len(rows), "min_val_bpb": min(row["val_bpb"] for row in rows)},
        curves=path,
    )
