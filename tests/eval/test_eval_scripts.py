"""The evaluation and RL stages end to end, on a tiny model that was never trained."""

import dataclasses
import functools
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_model import random_params

from nanochat_jax.checkpoint import Checkpoints, load_model
from nanochat_jax.errors import NotFound, UsageError
from nanochat_jax.eval.base_model import BaseEvalConfig
from nanochat_jax.eval.base_model import evaluate_base as base_eval
from nanochat_jax.eval.chat_model import ChatEvalConfig
from nanochat_jax.eval.chat_model import evaluate_chat as chat_eval
from nanochat_jax.metrics import read_metrics
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.paths import Paths
from nanochat_jax.tasks.base import Task, assistant, user
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import rl as rl_train
from nanochat_jax.train.optim import OptimizerConfig
from nanochat_jax.train.rl import ChatRLConfig, reinforce

TOKENIZER = Tokenizer({bytes([i]): i for i in range(256)})
MODEL = GPTConfig.classic(
    1, n_embd=32, n_head=1, n_kv_head=1, sequence_len=64, vocab_size=TOKENIZER.vocab_size
)

CORE_YAML = """
icl_tasks:
- {label: yes_no, dataset_uri: yes_no.jsonl, num_fewshot: [1], icl_task_type: multiple_choice}
- {label: next, dataset_uri: next.jsonl, num_fewshot: [0], icl_task_type: language_modeling}
"""


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """A base directory with a tokenizer, and a base and an sft model d1 at step 5."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    paths = Paths(tmp_path)
    TOKENIZER.save(paths.tokenizer)
    params = jax.tree.map(jnp.asarray, random_params(MODEL, 0.1))
    meta = {
        "model_config": dataclasses.asdict(MODEL),
        "tokenizer": TOKENIZER.fingerprint(),
        "data": "embedded",
        "rates": dataclasses.asdict(OptimizerConfig()),
        "config": {},
        "step": 5,
    }
    for source in ("base", "sft"):
        with Checkpoints(paths.checkpoints(source) / "d1") as checkpoints:
            checkpoints.save(5, params, None, meta)
            checkpoints.wait()
    return paths


def section(paths: Paths, slug: str) -> dict:
    return json.loads((paths.report / f"{slug}.json").read_text())


def test_base_eval_runs_core_if_the_bundle_is_on_disk(paths):
    (paths.eval_bundle / "eval_data").mkdir(parents=True)
    (paths.eval_bundle / "core.yaml").write_text(CORE_YAML)
    (paths.eval_bundle / "eval_meta_data.csv").write_text(
        "Eval Task,Random baseline\nyes_no,50\nnext,0\n"
    )
    rows = [{"query": f"{i}?", "choices": ["yes", "no"], "gold": i % 2} for i in range(5)]
    (paths.eval_bundle / "eval_data" / "yes_no.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (paths.eval_bundle / "eval_data" / "next.jsonl").write_text(
        json.dumps({"context": "a", "continuation": "b"})
    )
    base_eval(BaseEvalConfig(eval="core", device_batch_size=4))
    results = section(paths, "base-model-evaluation")["results"]
    assert list(results) == ["core", "yes_no", "next"]
    assert results["core"] == pytest.approx((results["yes_no"] + results["next"]) / 2)
    table = (paths.base / "base_eval" / "base_model_d1_000005.csv").read_text().splitlines()
    assert [line.split(",")[0].strip() for line in table] == ["Task", "yes_no", "next", "CORE"]


QUICK = dict(source="sft", max_new_tokens=4, batch_size=4, mesh="1x1")


def test_chat_eval_writes_problems_and_a_file_keeps_the_results_of_tasks(paths, tmp_path):
    directory = paths.checkpoints("sft") / "d1"
    chat_eval(ChatEvalConfig(task_name="Arithmetic", max_problems=3, **QUICK))
    logged = section(paths, "chat-evaluation-sft")
    assert (logged["results"], logged["stage"]) == ({"arithmetic": 0.0}, "chat_eval_sft")
    before = (directory / "chat_eval_arithmetic.jsonl").read_text()
    assert [json.loads(line)["index"] for line in before.splitlines()] == [0, 1, 2]

    (tmp_path / "arithmetic.jsonl").write_text(json.dumps([user("1+1?"), assistant("two")]))
    chat_eval(ChatEvalConfig(task_file=str(tmp_path / "arithmetic.jsonl"), **QUICK))
    logged = section(paths, "chat-evaluation-sft")
    first, second = logged["results"]
    assert first == "arithmetic" and second.startswith("arithmetic_")
    assert logged["model"] == "d1, step 5"
    assert "Results of earlier evaluations, with their own settings: arithmetic" in logged["items"]
    assert (directory / "chat_eval_arithmetic.jsonl").read_text() == before
    assert (directory / f"chat_eval_{second}.jsonl").exists()


def test_chat_eval_fails_on_a_task_that_cannot_be_loaded(paths):
    with pytest.raises(UsageError, match="Arithmatic"):
        chat_eval(ChatEvalConfig(source="sft", task_name="Arithmetic|Arithmatic", max_problems=1))
    with pytest.raises(NotFound, match="words.txt"):
        chat_eval(ChatEvalConfig(source="sft", task_name="Spelling", max_problems=1))
    assert not paths.report.exists()


class Even(Task):
    """Replies of even length are right: something that an untrained model does now and then."""

    eval_type = "generative"

    def num_examples(self) -> int:
        return 4

    def get_example(self, index: int):
        return {"messages": [user(f"{index}"), assistant("..")]}

    def evaluate(self, conversation, completion):
        return sum(map(ord, completion)) % 2 == 0


RL = ChatRLConfig(
    task="arithmetic",
    num_iterations=3,
    examples_per_step=2,
    num_samples=4,
    device_batch_size=2,
    max_new_tokens=4,
    eval_examples=2,
    save_every=2,
    num_slots=8,
    mesh="1x1",
)


def test_rl_saves_evaluates_and_resumes(paths, monkeypatch):
    monkeypatch.setattr(rl_train, "load_eval_task", lambda name, paths, split: Even())
    config = RL
    reinforce(config)
    whole = load_model(paths, "rl")
    assert (whole.step, whole.tag, whole.meta["from"]) == (3, "d1", ["sft", "d1", 5])
    directory = paths.checkpoints("rl") / "d1"
    lines = read_metrics(directory / "metrics.jsonl")
    kinds = [("eval", 0), ("train", 0), ("train", 1), ("train", 2), ("eval", 3)]
    assert [(line["kind"], line["step"]) for line in lines] == kinds
    names = {"task", "num_iterations", "accuracy", "pass@1", "pass@2", "seconds"}
    assert set(section(paths, "chat-rl")["results"]) == names

    shutil.rmtree(directory / "3")  # as if it had been stopped after step 2
    reinforce(dataclasses.replace(config, resume=True))
    resumed, start = load_model(paths, "rl"), load_model(paths, "sft")
    assert resumed.step == 3
    assert any(
        np.any(a != b)
        for a, b in zip(*map(jax.tree.leaves, (whole.params, start.params)), strict=True)
    )
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    steps = [
        line["step"]
        for line in read_metrics(directory / "metrics.jsonl")
        if line["kind"] == "train"
    ]
    assert steps == [0, 1, 2]


@pytest.mark.parametrize("calls", [10, 22], ids=["between steps 0 and 1", "in an evaluation"])
def test_rl_stopped_by_a_signal_goes_on_as_if_it_had_not_been(paths, monkeypatch, calls):
    task, judged = Even(), []

    def evaluate(conversation, completion):
        judged.append(completion)
        if len(judged) == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return Even.evaluate(task, conversation, completion)

    monkeypatch.setattr(rl_train, "load_eval_task", lambda name, paths, split: task)
    config = dataclasses.replace(RL, eval_every=1)
    reinforce(config)
    whole = load_model(paths, "rl")
    monkeypatch.setattr(task, "evaluate", evaluate)
    judged.clear()
    with pytest.raises(SystemExit, match="75"):
        reinforce(dataclasses.replace(config, fresh=True))
    stopped = load_model(paths, "rl")
    assert stopped.step < 3
    monkeypatch.setattr(task, "evaluate", functools.partial(Even.evaluate, task))
    reinforce(dataclasses.replace(config, resume=True))
    assert load_model(paths, "rl").step == 3
    jax.tree.map(np.testing.assert_array_equal, load_model(paths, "rl").params, whole.params)
    lines = read_metrics(paths.checkpoints("rl") / "d1" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [0, 1, 2]


def test_rl_refuses_what_it_cannot_reward_or_resume(paths, tmp_path):
    questions = tmp_path / "questions.jsonl"
    question = json.dumps({"question": "1?", "choices": ["a", "b"], "answer": 0})
    questions.write_text(f"{question}\n" * 40)
    with pytest.raises(UsageError, match="no generated replies to reward"):
        reinforce(dataclasses.replace(RL, task_file=str(questions)))
    with pytest.raises(UsageError, match="'Arithmatic'"):
        reinforce(dataclasses.replace(RL, task="Arithmatic"))
    assert not paths.checkpoints("rl").exists()


def test_a_file_of_conversations_is_evaluated_and_learned(paths, tmp_path):
    chats = tmp_path / "my-chats.jsonl"
    chats.write_text(
        "".join(json.dumps([user(f"{i}"), assistant("yes")]) + "\n" for i in range(40))
    )
    chat_eval(ChatEvalConfig(task_file=str(chats), max_problems=3, **QUICK))
    assert section(paths, "chat-evaluation-sft")["results"] == {"my_chats": 0.0}
    reinforce(dataclasses.replace(RL, task_file=str(chats), num_iterations=1))
    assert section(paths, "chat-rl")["results"]["task"] == "my_chats"
