"""CORE: mean centered accuracy over 22 in-context learning tasks (DCLM, arXiv:2406.11794).

Nothing is generated: a span of tokens is scored in each prompt of an example. `multiple_choice` and
`schema` choose the option whose span has the lowest mean negative log-likelihood.
`language_modeling` is correct if every token of the span is the most likely one. Few-shot examples,
their order and the spans are upstream's, so scores are comparable.
"""

import csv
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from nanochat_jax.data.convert import open_text
from nanochat_jax.errors import UsageError, explaining
from nanochat_jax.eval.scoring import Row, RowScore, common_length
from nanochat_jax.files import parse_json
from nanochat_jax.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# what the parsers of a bundle's files raise for damaged ones
DAMAGED = (yaml.YAMLError, csv.Error, ValueError, TypeError, AttributeError, IndexError)

SHUFFLE_SEED = 1337  # order of a task's examples, before truncation to `max_per_task`
FEWSHOT_SEED = 1234  # plus the example's index: selects its few-shot examples
ENCODE_EXAMPLES = 64  # examples tokenized together

TaskType = Literal["multiple_choice", "schema", "language_modeling"]
Place = tuple[int, int]  # (task index, example index)
# implemented by scoring.Scorer
Scorer = Callable[[Iterable[tuple[Place, list[Row]]]], Iterator[tuple[Place, list[RowScore]]]]
# {query, choices, gold}, {context_options, continuation, gold} or {context, continuation}
Item = dict[str, Any]

# the field of the options, if any, then the text fields
FIELDS: dict[TaskType, tuple[str, ...]] = {
    "multiple_choice": ("choices", "query"),
    "schema": ("context_options", "continuation"),
    "language_modeling": ("", "context", "continuation"),
}


@dataclass(frozen=True, kw_only=True)
class CoreTask:
    """One entry of the bundle's core.yaml."""

    label: str
    type: TaskType
    path: Path  # JSON Lines
    num_fewshot: int
    delimiter: str  # between the context and the scored text
    baseline: float  # accuracy of random guessing, 0..1


@dataclass(frozen=True)
class CoreResult:
    """Accuracy by task, in the bundle's order, also centered so that guessing is 0."""

    accuracy: dict[str, float]
    centered: dict[str, float]
    core: float


def read_tasks(bundle: Path) -> list[CoreTask]:
    """The tasks in `core.yaml` and `eval_meta_data.csv` of a bundle.

    Raises `UsageError` if they are damaged, and KeyError or FileNotFoundError if something is
    missing.
    """
    what = f"core.yaml or eval_meta_data.csv in {bundle} is damaged"
    with explaining(what, "remove the directory to download it again", *DAMAGED, RecursionError):
        entries = yaml.safe_load((bundle / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
        with (bundle / "eval_meta_data.csv").open(newline="", encoding="utf-8") as file:
            baselines = {
                row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(file)
            }
        return [
            CoreTask(
                label=entry["label"],
                type=entry["icl_task_type"],
                path=bundle / "eval_data" / entry["dataset_uri"],
                num_fewshot=entry["num_fewshot"][0],
                delimiter=entry.get("continuation_delimiter", " "),
                baseline=0.01 * baselines[entry["label"]],
            )
            for entry in entries
        ]


def read_items(task: CoreTask, max_per_task: int = -1) -> list[Item]:
    """A task's examples in evaluation order; only the first `max_per_task` if that is positive.

    Raises `UsageError` with file and line for a line that is not an example of the task.
    """
    items, advice = [], "remove the evaluation bundle to download it again"
    with open_text(task.path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                with explaining(f"{task.path} line {number} is damaged", advice, ValueError):
                    items.append(_checked(task, parse_json(line)))
    random.Random(SHUFFLE_SEED).shuffle(items)
    return items[:max_per_task] if max_per_task > 0 else items


def _checked(task: CoreTask, item: Any) -> Item:
    """The example, if it has the fields of its type. Otherwise raises ValueError."""
    options, *texts = FIELDS[task.type]
    if not isinstance(item, dict) or not all(isinstance(item.get(name), str) for name in texts):
        raise ValueError(f"expected an object with the strings {', '.join(texts)}")
    if options:
        values, gold = item.get(options), item.get("gold")
        if not (isinstance(values, list) and all(isinstance(value, str) for value in values)):
            raise ValueError(f"{options} must be an array of strings")
        if not (isinstance(gold, int) and 0 <= gold < len(values)):
            raise ValueError(f"gold must be the index of one of the {len(values)} {options}")
    return item


def fewshot_indices(index: int, num_items: int, num_fewshot: int) -> list[int]:
    """Indices of `num_fewshot` examples other than `index`, or of all others if there are fewer."""
    others = [i for i in range(num_items) if i != index]
    return random.Random(FEWSHOT_SEED + index).sample(others, min(num_fewshot, len(others)))


def render_prompts(task: CoreTask, items: Sequence[Item], index: int) -> list[str]:
    """The prompts of one example, few-shot examples first.

    multiple_choice: one per choice. schema: one per context. language_modeling: without, then with
    the continuation.
    """
    shots = "".join(
        _solved(task, items[i]) + "\n\n"
        for i in fewshot_indices(index, len(items), task.num_fewshot)
    )
    item = items[index]
    if task.type == "multiple_choice":
        return [f"{shots}{item['query']}{task.delimiter}{choice}" for choice in item["choices"]]
    if task.type == "schema":
        return [
            f"{shots}{context}{task.delimiter}{item['continuation']}"
            for context in item["context_options"]
        ]
    # Stripped, so that the prompt's tokens are a prefix of the full ones: a trailing space would
    # belong to the continuation's first token.
    given = f"{shots}{item['context'].strip()}{task.delimiter}"
    return [given.strip(), given + item["continuation"]]


def _solved(task: CoreTask, item: Item) -> str:
    if task.type == "multiple_choice":
        return f"{item['query']}{task.delimiter}{item['choices'][item['gold']]}"
    if task.type == "schema":
        return f"{item['context_options'][item['gold']]}{task.delimiter}{item['continuation']}"
    return f"{item['context'].strip()}{task.delimiter}{item['continuation']}"


def make_rows(task: CoreTask, prompts: Sequence[Sequence[int]]) -> list[Row]:
    """The rows to score for one example, from the tokens of its prompts.

    The span is what follows the common prefix of the choices (multiple_choice), the common suffix
    of the contexts (schema), or the continuation (language_modeling). Raises ValueError if the
    tokens of the prompt without the continuation are not a prefix of the tokens with it.
    """
    arrays = [np.asarray(tokens, np.int32) for tokens in prompts]
    if task.type == "language_modeling":
        without, full = arrays
        if not np.array_equal(full[: len(without)], without):
            raise ValueError(
                f"{task.label}: the prompt's tokens do not begin those of prompt and continuation"
            )
        return [Row(full, len(without), len(full))]
    if task.type == "schema":
        suffix = common_length([tokens[::-1] for tokens in arrays])
        return [Row(tokens, len(tokens) - suffix, len(tokens)) for tokens in arrays]
    prefix = common_length(arrays)
    return [Row(tokens, prefix, len(tokens)) for tokens in arrays]


def is_correct(task: CoreTask, item: Item, scores: Sequence[RowScore]) -> bool:
    if task.type == "language_modeling":
        return scores[0].all_argmax
    # The lowest, the first on ties. nan is the minimum only in the first position: upstream's rule,
    # for comparable scores.
    losses = [score.mean_nll for score in scores]
    return losses.index(min(losses)) == item["gold"]


def mean_of(correct: int, total: int) -> float:
    """Accuracy rounded to float32, as upstream's, so that tables agree to the last digit."""
    return float(np.float32(correct) / np.float32(total))


def center(accuracy: float, baseline: float) -> float:
    return (accuracy - baseline) / (1.0 - baseline)


def tokenize_task(
    tokenizer: Tokenizer, task: CoreTask, items: Sequence[Item], indices: Sequence[int]
) -> list[list[Row]]:
    """The rows of each of the examples `indices`."""
    prompts = [render_prompts(task, items, index) for index in indices]
    tokens = iter(
        tokenizer.encode(
            [prompt for group in prompts for prompt in group], prepend=tokenizer.bos_id
        )
    )
    return [make_rows(task, [next(tokens) for _ in group]) for group in prompts]


def evaluate_core(
    scorer: Scorer,
    tokenizer: Tokenizer,
    bundle: Path,
    *,
    max_per_task: int = -1,
    on_example: Callable[[str, int, list[Row], list[RowScore], bool], None] | None = None,
) -> CoreResult:
    """Evaluate the tasks of a bundle."""
    tasks = read_tasks(bundle)
    items = [read_items(task, max_per_task) for task in tasks]
    for task, of_task in zip(tasks, items, strict=True):
        if not of_task:
            raise UsageError(
                f"{task.path} holds no examples: remove {bundle} so that it is downloaded again"
            )

    groups: dict[Place, list[Row]] = {}

    def examples() -> Iterator[tuple[Place, list[Row]]]:
        for t, task in enumerate(tasks):
            for first in range(0, len(items[t]), ENCODE_EXAMPLES):
                indices = range(first, min(first + ENCODE_EXAMPLES, len(items[t])))
                for index, group in zip(
                    indices, tokenize_task(tokenizer, task, items[t], indices), strict=True
                ):
                    groups[t, index] = group
                    yield (t, index), group

    correct, done = [0] * len(tasks), [0] * len(tasks)
    total, began, reported = sum(map(len, items)), time.monotonic(), time.monotonic()
    for (t, index), scores in scorer(examples()):
        group = groups.pop((t, index))
        if any(
            math.isnan(score.mean_nll)
            for row, score in zip(group, scores, strict=True)
            if row.end > row.start
        ):
            raise FloatingPointError(
                f"the model's logits are not finite, at example {index} of {tasks[t].label}"
            )
        verdict = is_correct(tasks[t], items[t][index], scores)
        correct[t] += verdict
        done[t] += 1
        if on_example is not None:
            on_example(tasks[t].label, index, group, scores, verdict)
        if time.monotonic() - reported > 30:
            reported = time.monotonic()
            logger.info("CORE: %d of %d examples in %.0f s", sum(done), total, reported - began)

    accuracy = {task.label: mean_of(correct[t], done[t]) for t, task in enumerate(tasks)}
    centered = {task.label: center(accuracy[task.label], task.baseline) for task in tasks}
    logger.info("CORE: %d examples in %.1f s", total, time.monotonic() - began)
    return CoreResult(accuracy, centered, sum(centered.values()) / len(centered))


def format_csv(result: CoreResult) -> str:
    """Table in upstream's format: columns Task, Accuracy, Centered, padded to 35, 10 and 10."""
    lines = [f"{'Task':<35}, {'Accuracy':<10}, {'Centered':<10}"]
    for label, accuracy in result.accuracy.items():
        lines.append(f"{label:<35}, {accuracy:<10.6f}, {result.centered[label]:<10.6f}")
    lines.append(f"{'CORE':<35}, {'':<10}, {result.core:<10.6f}")
    return "\n".join(lines) + "\n"
