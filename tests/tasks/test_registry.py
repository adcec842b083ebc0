"""The table of tasks, and the tasks of upstream on real rows."""

import importlib
import pkgutil
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from task_helpers import questions

from nanochat_jax import tasks
from nanochat_jax.tasks import gsm8k, hub, mixtures, registry
from nanochat_jax.tasks.base import Task, TaskMixture


@pytest.mark.parametrize(
    "name, key, eval_type, baseline, size",
    [
        ("ARC-Easy", "arc_easy", "categorical", 0.25, 1521),
        ("ARC-Challenge", "arc_challenge", "categorical", 0.25, 779),
        ("MMLU", "mmlu", "categorical", 0.25, 9214),
        ("GSM8K", "gsm8k", "generative", 0.0, 862),
        ("HumanEval", "humaneval", "generative", 0.0, 94),
        ("SpellingBee", "spelling_bee", "generative", 0.0, 256),
    ],
)
def test_evaluation_tasks_on_real_rows(paths, name, key, eval_type, baseline, size):
    task = tasks.load_eval_task(name, paths)
    assert (task.key, task.eval_type, task.baseline, len(task)) == (key, eval_type, baseline, size)
    few = task.view(stop=7)
    assert [c["messages"] for c in few] == [task[i]["messages"] for i in range(7)]
    for conversation in (task[i] for i in range(0, size, 1 if eval_type == "categorical" else 10)):
        question, reply = conversation["messages"]
        assert (question["role"], reply["role"]) == ("user", "assistant")
        if eval_type == "categorical":
            letters = conversation["letters"]
            assert 2 < len(letters) < 6 and len(set(letters)) == len(letters)
            assert [task.evaluate(conversation, letter) for letter in letters].count(True) == 1
            for letter in letters:
                assert f"={letter}\n" in question["content"]
        elif name != "HumanEval":
            assert task.evaluate(conversation, reply["content"][-1]["text"])
            assert not task.evaluate(conversation, "#### 123456")


def test_rows_are_in_the_order_of_numpys_permutation(paths):
    table = pq.read_table(paths.task_data / "openai--gsm8k/main/train/00000.parquet")
    order = np.random.default_rng(42).permutation(table.num_rows)
    task = gsm8k.GSM8K(paths, "train").view(stop=50)
    assert questions(task) == [table["question"][int(i)].as_py() for i in order[:50]]


def test_gsm8k_parts_are_the_solution(paths):
    table = pq.read_table(paths.task_data / "openai--gsm8k/main/test/00000.parquet")
    for answer in table["answer"].to_pylist():
        parts = gsm8k.parse_solution(answer)
        forms = {"text": "{}", "python": "<<{}=", "python_output": "{}>>"}
        assert "".join(forms[part["type"]].format(part["text"]) for part in parts) == answer
        assert sum(part["type"] == "python" for part in parts) == answer.count("<<")


def test_humaneval_runs_the_tests(paths):
    task = tasks.load_eval_task("HumanEval", paths).view(stop=2)
    for conversation in task:
        solution = conversation["messages"][1]["content"]
        assert task.evaluate(conversation, f"Here it is:\n```python\n{solution}\n```")
        assert not task.evaluate(
            conversation, conversation["messages"][0]["content"] + "    return None\n"
        )


def leaves(task_class):
    below = task_class.__subclasses__()
    return [leaf for each in below for leaf in leaves(each)] if below else [task_class]


def test_every_task_of_the_package_is_in_the_table_and_complete(paths):
    paths.data("embedded").mkdir()
    (paths.data("embedded") / "words.txt").write_text("stone happy river window copper")
    evaluated = {name: load(paths, "test") for name, load in registry.EVAL_TASKS.items()}
    mixed = [load(paths, "test") for load in registry.MIXED.values()]
    for name, task in evaluated.items():
        assert tasks.eval_task_name(task.key) == name and task.eval_type and len(task) > 0
        assert type(task).evaluate is not Task.evaluate
        assert tasks.load_eval_task(task.key, paths).key == task.key
    for module in pkgutil.iter_modules(tasks.__path__):
        importlib.import_module(f"nanochat_jax.tasks.{module.name}")
    in_table = {type(task) for task in [*evaluated.values(), *mixed]}
    for leaf in leaves(Task):
        if leaf.__module__.startswith("nanochat_jax.tasks."):
            assert leaf in {*in_table, TaskMixture, mixtures.Chained}, f"{leaf} has no entry"
            if issubclass(leaf, hub.HubTask):
                assert re.fullmatch("[0-9a-f]{40}", leaf.data.commit)
    offline, upstream = map(tasks.eval_tasks_for, ("embedded", "fineweb"))
    assert sorted(offline + upstream) == sorted(evaluated)
