"""Evaluation of a base model, ours or one of transformers: CORE, bits per byte, samples."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from nanochat_jax.checkpoint import load_model
from nanochat_jax.cli import LARGEST, count, flag
from nanochat_jax.devices import ModelFlags, Processes, start
from nanochat_jax.eval.bpb import corpus_bits_per_byte
from nanochat_jax.eval.bundle import ensure_bundle, has_bundle
from nanochat_jax.eval.core import Scorer as CoreScorer
from nanochat_jax.eval.core import evaluate_core, format_csv
from nanochat_jax.eval.samples import PROMPTS, free_samples, greedy_samples, sample_items
from nanochat_jax.eval.scoring import Scorer, rows_for
from nanochat_jax.files import make_directory, write_file
from nanochat_jax.infer.engine import Engine
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.paths import Paths
from nanochat_jax.report import sections

log = logging.getLogger(__name__)

PARTS = ("core", "bpb", "sample")


@dataclass(frozen=True, kw_only=True)
class BaseEvalConfig(ModelFlags, Processes):
    eval: str = flag(
        "auto",
        "which of core, bpb and sample, separated by commas; auto: samples, and CORE if its bundle "
        "is on disk or the model's corpus was downloaded",
    )
    max_per_task: int = count(-1, "examples of each CORE task; -1: all", also=-1)
    split_tokens: int = count(
        40 * 524288, "tokens of each split for bits per byte", at_most=LARGEST
    )
    device_batch_size: int = count(32, "rows of the model's length per device", at_most=10**6)
    hf_path: str | None = flag(
        None, "evaluate this directory of a transformers model instead; needs the extra torch"
    )
    trust_remote_code: bool = flag(False, "let --hf-path run the model code in its directory")

    def __post_init__(self) -> None:
        ours = (self.mesh, self.dtype, self.model_tag, self.step)
        if self.hf_path and ours != ("auto", "auto", None, None):
            raise ValueError(
                "`mesh`, `dtype`, `model_tag` and `step` have no effect with `hf_path`: omit them"
            )
        if self.eval != "auto" and set(self.parts) - set(PARTS):
            raise ValueError(
                f"`eval` {self.eval!r}: expected auto, or some of {', '.join(PARTS)} separated by "
                "commas"
            )

    @property
    def parts(self) -> list[str]:
        return self.eval.split(",")


def evaluate_base(config: BaseEvalConfig) -> None:
    """Evaluate the model and write its section of the report, merged with earlier results."""
    paths = Paths.from_env()
    start(paths, config)
    make_directory(paths.report)
    evaluate = _evaluate_transformers if config.hf_path else _evaluate_checkpoint
    name, results, items = evaluate(config, paths)
    if jax.process_index() > 0:
        return
    section = "Base model evaluation"
    with sections.earlier_evaluation(paths.report, section, name) as earlier:
        if earlier:
            results = earlier.results | results
            items = items or [
                item
                for item in earlier.items
                if isinstance(item, dict) and any("sample " in key for key in item)
            ]
        sections.log_section(
            paths.report,
            section,
            [f"Model: {name}", dataclasses.asdict(config), results, *items],
            stage="base_eval",
            results=results,
            model=name,
        )


def _evaluate_checkpoint(
    config: BaseEvalConfig, paths: Paths
) -> tuple[str, dict[str, float], list]:
    """(model name, results, other items of the report)."""
    mesh = make_mesh(config.mesh)
    compute = Compute.on(mesh, dtype=config.dtype)
    loaded = load_model(paths, "base", tag=config.model_tag, step=config.step, mesh=mesh)
    model, tokenizer = (loaded.config, loaded.params), loaded.tokenizer
    parts, results, items = config.parts, dict[str, float](), list[str | dict[str, str]]()
    if config.eval == "auto":
        parts = ["sample"]
        if has_bundle(paths) or loaded.meta["data"] != "embedded":
            parts.append("core")
        else:
            note = (
                "CORE was not evaluated: the model was trained on the embedded corpus and "
                f"{paths.eval_bundle} is not on disk. `--eval core,sample` downloads it."
            )
            items.append(note)
            log.warning("%s", note)
    if "core" in parts:
        scorer = Scorer(
            config=loaded.config,
            params=loaded.params,
            num_rows=rows_for(config.device_batch_size),
            compute=compute,
        )
        table = f"base_model_{loaded.tag}_{loaded.step:06d}"
        results |= _core(scorer, tokenizer, config, paths, table)
    if "bpb" in parts:
        results |= corpus_bits_per_byte(
            loaded,
            paths,
            device_batch_size=config.device_batch_size,
            split_tokens=config.split_tokens,
            compute=compute,
        )
    if "sample" in parts:
        engine = Engine(*model, tokenizer, num_slots=8, compute=compute)
        items += sample_items(greedy_samples(engine, tokenizer), free_samples(engine, tokenizer, 8))
    return f"{loaded.tag}, step {loaded.step}", results, items


def _evaluate_transformers(
    config: BaseEvalConfig, paths: Paths
) -> tuple[str, dict[str, float], list]:
    """(model name, results, other items of the report)."""
    from nanochat_jax.eval.hf_model import HFModel  # an optional extra

    assert config.hf_path
    directory = Path(config.hf_path)
    model = HFModel(
        directory,
        tokens=config.device_batch_size * 1024,
        trust_remote_code=config.trust_remote_code,
    )
    parts = config.parts if config.eval != "auto" else ["core", "sample"]
    results, items = dict[str, float](), []
    if "core" in parts:
        table = config.hf_path.strip("/").replace("/", "-")
        results |= _core(model, model.tokenizer, config, paths, table)
    if "bpb" in parts:
        results |= model.bits_per_byte(
            paths.data(paths.find_data()), config.device_batch_size, config.split_tokens
        )
    if "sample" in parts:
        items += sample_items(
            [prompt + model.continuation(prompt, 16) for prompt in PROMPTS],
            [model.continuation("", 128, seed=i) for i in range(8)],
        )
    return str(directory), results, items


def _core(
    scorer: CoreScorer, tokenizer: Any, config: BaseEvalConfig, paths: Paths, name: str
) -> dict[str, float]:
    """CORE and its tasks; writes upstream's table as base_eval/NAME.csv."""
    directory = paths.base / "base_eval"
    if jax.process_index() == 0:
        make_directory(directory)
    bundle = ensure_bundle(paths)
    result = evaluate_core(scorer, tokenizer, bundle, max_per_task=config.max_per_task)
    table = format_csv(result)
    log.info("%s", table)
    if jax.process_index() == 0:
        write_file(directory / f"{name}.csv", table)
    return {"core": result.core, **result.centered}
