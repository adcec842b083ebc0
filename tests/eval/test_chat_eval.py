"""Chat evaluation: letters against a plain forward pass, replies through the engine."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from chain_model import ASSISTANT_START, CHAIN, END, OUTPUT_END, PYTHON, PYTHON_END, chain_params
from golden_data import load_trained
from random_model import random_params

from nanochat_jax.conversation import render_for_completion
from nanochat_jax.errors import UsageError
from nanochat_jax.eval import chat
from nanochat_jax.eval.chat import Generator, Sampling
from nanochat_jax.infer.padding import padded_batches, padded_length
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.gpt import forward, unembed
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.paths import Paths
from nanochat_jax.tasks.arc import ARC
from nanochat_jax.tasks.base import Task, assistant, user
from nanochat_jax.tokenizer import Tokenizer

TOKENIZER = Tokenizer({bytes([i]): i for i in range(256)})
CONFIG = GPTConfig.modern(
    2, aspect_ratio=16, head_dim=32, sequence_len=64, vocab_size=TOKENIZER.vocab_size
)
LONG = 100  # longer than CONFIG.sequence_len


class Letters(Task):
    """Questions of three lengths with two to five letters."""

    key, eval_type, baseline = "letters", "categorical", 0.25

    def num_examples(self) -> int:
        return 12

    def get_example(self, index: int):
        letters = list("ABCDE"[: 2 + index % 4])
        question = f"{index}" + "?" * (1, 20, LONG)[index % 3]
        return {
            "messages": [user(question), assistant(letters[index % len(letters)])],
            "letters": letters,
        }

    def evaluate(self, conversation, completion):
        assert completion in conversation["letters"]
        return completion == conversation["messages"][-1]["content"]


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def test_batches_hold_every_sequence_once_and_have_few_shapes():
    sequences = [[i] * (i + 1) for i in range(100)]
    seen, shapes = {}, set()
    for indices, tokens in padded_batches(sequences, tokens=256):
        shapes.add(tokens.shape)
        seen |= {index: tokens[row].tolist() for row, index in enumerate(indices)}
    assert shapes == {(8, 32), (4, 64), (2, 96), (2, 128)}
    assert seen == {
        i: each + [0] * (padded_length(i + 1) - i - 1) for i, each in enumerate(sequences)
    }


def letters_of(task, params, mesh=None):
    generator = Generator(
        config=CONFIG, params=params, tokenizer=TOKENIZER, num_slots=2, compute=Compute(mesh=mesh)
    )
    return chat.evaluate_categorical(task, generator)


@pytest.mark.parametrize("mesh", [None, "2x1"])
def test_the_likeliest_letter_is_chosen(params, mesh):
    task = Letters()
    problems = letters_of(task, params, mesh=mesh and make_mesh(mesh))
    assert [problem.index for problem in problems] == list(range(12))
    prompts = [render_for_completion(TOKENIZER, task[i]) for i in range(12)]
    padded = np.array([prompt + [0] * (128 - len(prompt)) for prompt in prompts])
    logits = jax.jit(
        lambda params: unembed(params, forward(params, padded, config=CONFIG)[0], config=CONFIG)
    )(params)
    for i, problem in enumerate(problems):
        letters = task[i]["letters"]
        scores = [float(logits[i, len(prompts[i]) - 1, ord(letter)]) for letter in letters]
        assert problem.completions == (letters[int(np.argmax(scores))],), i
        assert problem.passed == (problem.completions[0] == letters[i % len(letters)])
        assert problem.question == task[i]["messages"][0]["content"]


def test_a_model_gone_wrong_is_an_error_not_a_letter(params):
    with pytest.raises(FloatingPointError, match="not finite"):
        letters_of(Letters(), params | {"wte": np.full_like(params["wte"], np.nan)})


class Product(Task):
    key, eval_type = "product", "generative"

    def num_examples(self) -> int:
        return 5

    def get_example(self, index: int):
        return {"messages": [user("#" * (1 + 70 * index)), assistant("42")], "index": index}

    def evaluate(self, conversation, completion):
        return completion == "=ok"


def test_replies_are_judged_by_their_text_alone_and_long_prompts_are_not_cut():
    params = chain_params((ASSISTANT_START, PYTHON, "6*7", PYTHON_END), (OUTPUT_END, "=ok", END))
    generator = Generator(config=CHAIN, params=params, tokenizer=TOKENIZER, num_slots=3)
    problems = chat.evaluate_generative(Product(), generator, Sampling(max_new_tokens=20))
    # prompts up to three times the model's length
    assert [problem.passed for problem in problems] == [True] * 5
    called = "<|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>=ok"
    assert {problem.completions for problem in problems} == {(called,)}
    few = Product().view(stop=2)
    problems = chat.evaluate_generative(few, generator, Sampling(max_new_tokens=9))
    cut = "<|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>"
    assert [problem.completions for problem in problems] == [(cut,)] * 2
    assert not any(problem.passed for problem in problems)


class Vowel(Product):
    def evaluate(self, conversation, completion):
        return completion in tuple("aeiou")


def test_one_right_sample_of_several_passes(params):
    generator = Generator(config=CONFIG, params=params, tokenizer=TOKENIZER, num_slots=16)
    sampling = Sampling(num_samples=12, max_new_tokens=1, temperature=50.0, top_k=0)
    problems = chat.evaluate_generative(Vowel().view(stop=3), generator, sampling)
    for problem in problems:
        assert len(problem.completions) == 12 and len(set(problem.completions)) > 3
        assert problem.passed == any(
            completion in tuple("aeiou") for completion in problem.completions
        )
    completions = [problem.completions for problem in problems]
    assert len(set(completions)) == 3, "problems have random streams of their own"
    again = chat.evaluate_generative(Vowel().view(stop=3), generator, sampling)
    assert [problem.completions for problem in again] == completions


def test_chatcore_is_only_given_for_all_its_tasks():
    baselines = dict.fromkeys(chat.CHATCORE_6, 0.0) | dict.fromkeys(
        ("arc_easy", "arc_challenge", "mmlu"), 0.25
    )
    # Accuracies and result of an independent report of the classic code, which counts six tasks.
    accuracies = dict(zip(chat.CHATCORE_6, (0.4684, 0.3362, 0.3314, 0.0697, 0.0915, 1.0)))
    assert chat.chatcore(accuracies, baselines)["chatcore_6"] == pytest.approx(0.2793, abs=1e-4)
    # The README's table counts five.
    five = dict(zip(chat.CHATCORE_5, (0.3876, 0.2807, 0.3151, 0.0455, 0.0854)))
    assert chat.chatcore(five, baselines) == {"chatcore_5": pytest.approx(0.0884, abs=1e-4)}
    assert chat.chatcore({"arithmetic": 1.0}, {"arithmetic": 0.0}) == {}


def test_problems_are_written_a_line_each(tmp_path, params):
    problems = letters_of(Letters().view(stop=3), params)
    problems[2] = dataclasses.replace(problems[2], question="half a pair: \ud800")
    path = tmp_path / "new" / "problems.jsonl"
    chat.write_problems(path, problems)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2]
    assert lines[2]["question"] == "half a pair: \ud800"
    assert lines[0] == {
        "index": 0,
        "question": "0?",
        "completions": list(problems[0].completions),
        "passed": problems[0].passed,
    }
    assert [p.name for p in path.parent.iterdir()] == ["problems.jsonl"]


def test_a_question_file_takes_no_name_that_is_another_tasks_or_files(tmp_path):
    quiz, other = tmp_path / "quiz.jsonl", tmp_path / "more" / "quiz.jsonl"

    def key(file, reserved=False):
        return chat.own_key("quiz", file, tmp_path / "logs", reserved=reserved)

    assert key(quiz) == key(quiz.parent / "more" / ".." / "quiz.jsonl") == "quiz"
    second = key(other)
    assert second.startswith("quiz_") and key(other) == second and key(quiz) == "quiz"
    assert key(tmp_path / "gsm8k.jsonl", reserved=True).startswith("quiz_")
    (tmp_path / "logs" / "chat_eval_files.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match="chat_eval_files.json is damaged"):
        key(quiz)


def test_accuracy_on_arc_is_upstreams(test_data, tmp_path):
    config, params, tokenizer, _ = load_trained(test_data, "modern")
    (tmp_path / "task_data").symlink_to(test_data / "data" / "task_data")
    task = ARC(Paths(tmp_path), "ARC-Easy", "test")
    generator = Generator(config=config, params=params, tokenizer=tokenizer, num_slots=4)
    problems = chat.evaluate_categorical(task.view(stop=60), generator)
    assert sum(problem.passed for problem in problems) == 5


def test_an_answer_of_two_tokens_is_an_error(params):
    class Words(Letters):
        def get_example(self, index):
            return {"messages": [user("?"), assistant("AB")], "letters": ["AB", "C"]}

    with pytest.raises(ValueError, match="'AB' is 2 tokens"):
        letters_of(Words(), params)


def test_tasks_that_cannot_be_evaluated_are_errors(params):
    generator = Generator(config=CONFIG, params=params, tokenizer=TOKENIZER)

    class Training(Product):
        eval_type = None

    with pytest.raises(ValueError, match="only for training"):
        chat.evaluate_task(Training(), generator, Sampling())
    with pytest.raises(UsageError, match="no problems"):
        chat.evaluate_task(Product().view(5), generator, Sampling())
