"""Speed of evaluations: CORE and generated answers, compared to one at a time.

    NANOCHAT_TEST_DATA=DIR python benchmarks/eval.py [--max-per-task 60] [--every 12]

The model is upstream's reference checkpoint of 2025 (4 layers, width 256, vocabulary 2,048),
float32.

CORE, on the reference bundle, in examples per second. Ours: all examples, with and without
compilation. Baselines, on every n-th example of each task with the same number of shots: the same
model one example at a time, its choices as one batch of a power-of-two length, compiled in advance;
and transformers' PyTorch with the same weights, eager, one example at a time, on all threads and on
one.

Generation, in answers per second: answers of 48 tokens to arithmetic problems, all in one batch.
Baselines, one at a time: the same engine, and transformers' `generate` with its cache. Needs the
extra `torch`. Prints a table, then one JSON line.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch

from nanochat_jax.conversation import render_for_completion
from nanochat_jax.devices import start
from nanochat_jax.eval.chat import Generator, Sampling
from nanochat_jax.eval.core import evaluate_core, format_csv, read_items, read_tasks, tokenize_task
from nanochat_jax.eval.hf_model import HFModel
from nanochat_jax.eval.scoring import Row, Scorer
from nanochat_jax.interop.hf import write_hf
from nanochat_jax.interop.torch_checkpoint import Imported
from nanochat_jax.model.gpt import forward, unembed
from nanochat_jax.paths import Paths
from nanochat_jax.pretrained import read_foreign
from nanochat_jax.tasks.skills import Arithmetic

NEW_TOKENS = 48


def rate(run: Callable, items: list) -> float:
    """Items per second of `run`, one at a time."""
    began = time.perf_counter()
    for item in items:
        run(item)
    return len(items) / (time.perf_counter() - began)


def jax_one_example(model: Imported) -> Callable[[list[Row]], None]:
    log_probs = jax.jit(
        lambda params, tokens: jax.nn.log_softmax(
            unembed(params, forward(params, tokens, config=model.config)[0], config=model.config)
        )
    )

    def run(rows: list[Row]) -> None:
        tokens = np.zeros(
            (len(rows), 1 << (max(row.end for row in rows) - 1).bit_length()), np.int32
        )
        for i, row in enumerate(rows):
            tokens[i, : row.end] = row.tokens
        scores = log_probs(model.params, tokens)
        for i, row in enumerate(rows):
            at = np.arange(row.start, row.end)
            np.asarray(scores[i])[at - 1, row.tokens[at]].mean()

    return run


def core(
    model: Imported, theirs: HFModel, bundle: Path, given: argparse.Namespace
) -> dict[str, float]:
    sample = []
    for task in read_tasks(bundle):
        items = read_items(task, given.max_per_task)
        sample += tokenize_task(model.tokenizer, task, items, range(0, len(items), given.every))
    count, results = 0, {}

    def on_example(*_: object) -> None:
        nonlocal count
        count += 1

    for name in ("ours_compiling", "ours"):
        count, began = 0, time.perf_counter()
        result = evaluate_core(
            Scorer(config=model.config, params=model.params, num_rows=given.rows),
            model.tokenizer,
            bundle,
            max_per_task=given.max_per_task,
            on_example=on_example,
        )
        results[name] = count / (time.perf_counter() - began)
    print(format_csv(result).splitlines()[-1])
    results["torch_one_at_a_time"] = rate(theirs.score, sample)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results["torch_one_at_a_time_1_thread"] = rate(theirs.score, sample)
    torch.set_num_threads(threads)
    one = jax_one_example(model)
    rate(one, sample)  # compiles
    return results | {"jax_one_at_a_time": rate(one, sample)}


def generation(model: Imported, theirs: HFModel, given: argparse.Namespace) -> dict[str, float]:
    task = Arithmetic("test", given.problems)
    prompts = [render_for_completion(model.tokenizer, task[i]) for i in range(given.problems)]
    sampling = Sampling(max_new_tokens=NEW_TOKENS)

    def answers(slots: int, prompts: list) -> float:
        generator = Generator(
            config=model.config, params=model.params, tokenizer=model.tokenizer, num_slots=slots
        )
        generator(prompts, sampling)  # compiles
        began = time.perf_counter()
        generator(prompts, sampling)
        return len(prompts) / (time.perf_counter() - began)

    def torch_answer(prompt: list[int]) -> None:
        ids = torch.tensor([prompt])
        theirs.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )

    few = prompts[: given.problems // 8]
    return {
        "ours": answers(given.slots, prompts),
        "engine_one_at_a_time": answers(1, few),
        "torch_one_at_a_time": rate(torch_answer, few),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-per-task", type=int, default=60, help="CORE examples of each task")
    parser.add_argument(
        "--every", type=int, default=12, help="one at a time, every n-th of them only"
    )
    parser.add_argument("--rows", type=int, default=4, help="CORE examples of a batch")
    parser.add_argument("--problems", type=int, default=128, help="answers to generate")
    parser.add_argument("--only", choices=["core", "generation"], help="one of the two tables")
    parser.add_argument("--slots", type=int, default=64, help="answers generated in parallel")
    given = parser.parse_args()
    if not os.environ.get("NANOCHAT_TEST_DATA"):
        print(
            "error: NANOCHAT_TEST_DATA is not set: it names the folder with the checkpoint and "
            "the bundle",
            file=sys.stderr,
        )
        return 2
    reference = Path(os.environ["NANOCHAT_TEST_DATA"])
    with tempfile.TemporaryDirectory() as scratch:
        start(Paths(Path(scratch)), compile_cache=False)
        model = read_foreign(reference / "golden" / "trained-classic")
        (Path(scratch) / "hf").mkdir()
        write_hf(Path(scratch) / "hf", model.config, model.params, model.tokenizer)
        theirs = HFModel(Path(scratch) / "hf", tokens=1)
        results = {}
        if given.only != "generation":
            results["core"] = core(model, theirs, reference / "data" / "eval_bundle", given)
        if given.only != "core":
            results["generation"] = generation(model, theirs, given)
    device = jax.devices()[0]
    print(f"\n{device.device_kind} x {jax.device_count()}, {os.cpu_count()} cores, float32")
    for name, unit in (("core", "examples/s"), ("generation", "answers/s")):
        for way, value in results.get(name, {}).items():
            print(
                f"{name:10}  {way:28}  {value:8.2f} {unit:10}  ours is "
                f"{results[name]['ours'] / value:6.2f} x"
            )
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
