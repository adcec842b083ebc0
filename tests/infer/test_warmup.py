"""Programs are compiled ahead, each once, and before others if a request needs them."""

import threading
import time

import jax
import numpy as np
import pytest
from chain_model import CHAIN, END, OUTPUT_END, PYTHON, PYTHON_END, chain_engine

from nanochat_jax.infer import warmup as warmup_module
from nanochat_jax.infer.programs import Programs
from nanochat_jax.infer.request import Request
from nanochat_jax.infer.scheduler import Scheduler
from nanochat_jax.infer.warmup import compile_all, warmup
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.sharding import make_mesh

SECONDS = 120  # for anything to happen on a busy machine


@pytest.fixture
def compiled():
    """The programs that JAX compiles during the test."""
    names = []

    def listen(event, *_, fun_name="", **__):
        if event.endswith("backend_compile_duration"):
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def request(seed, longest):
    rng = np.random.default_rng(seed)
    letters = rng.choice([ord("a"), ord("b"), ord("Q")], rng.integers(1, longest))
    return Request(
        tuple(letters.tolist()),
        seed=seed,
        max_tokens=int(rng.integers(1, 60)),
        temperature=float(rng.integers(0, 2)),
        top_k=int(rng.integers(0, 70)),
        top_p=float(rng.choice([0.3, 1.0])),
        logprobs=bool(rng.integers(0, 2)),
        stop_tokens=(7,) * int(rng.integers(0, 3)),
    )


def engine_with(**options):
    texts = ("ab",), ("Q:", PYTHON, "12*34", PYTHON_END), (OUTPUT_END, "fine", END)
    return chain_engine(*texts, num_slots=8, **options)


@pytest.mark.parametrize("mesh", [None, "2x1"])
def test_after_warmup_no_request_compiles(mesh, compiled):
    # prompts of up to 90 tokens, then longer ones, for which the cache grows, then short ones
    compute = Compute() if mesh is None else Compute(mesh=make_mesh(mesh))
    engine = engine_with(max_len=300, compute=compute)
    compile_all(engine)
    assert engine.programs.left == 0 and engine.programs.compiled == engine.programs.total < 40
    assert "jit(decode)" in compiled and "jit(resize)" in compiled
    del compiled[:]
    results = []
    for longest, count in ((90, 150), (280, 30), (20, 20)):
        with Scheduler(engine, max_waiting=count) as scheduler:
            handles = scheduler.submit_all([request(seed, longest) for seed in range(count)])
            results += [handle.result(SECONDS) for handle in handles]
    assert not compiled
    assert any(not all(result.sampled) for result in results)
    assert {result.finish_reason for result in results} == {"stop", "length"}
    assert max(result.prompt_tokens + len(result.tokens) for result in results) > 256


def test_a_request_is_answered_while_other_programs_wait(monkeypatch, compiled):
    wait = threading.Event()
    run = warmup_module._Compiler.run

    def slow(*args, **options):
        wait.wait(SECONDS)
        return run(*args, **options)

    monkeypatch.setattr(warmup_module._Compiler, "run", slow)
    # a shape that no other test compiles
    engine = chain_engine(("ab",), max_len=CHAIN.sequence_len, num_slots=5)
    try:
        with warmup(engine), Scheduler(engine) as scheduler:
            answer = scheduler.submit(Request(tuple(b"aba"), max_tokens=3, temperature=0.0))
            assert answer.result(SECONDS).text == "bab"
            needed = ["jit(new_slots)", "jit(prefill)", "jit(decode)"]
            assert [name for name in compiled if name in needed] == needed
            assert (engine.programs.compiled, engine.programs.left) == (
                3,
                engine.programs.total - 3,
            )
            wait.set()
    finally:
        wait.set()


def test_a_program_that_cannot_be_compiled_ahead_is_only_a_warning(monkeypatch, caplog):
    run = warmup_module._Compiler.run

    def failing(loop, function, *args, **options):
        if function.__name__ == "copy":
            raise RuntimeError("out of memory")
        return run(loop, function, *args, **options)

    monkeypatch.setattr(warmup_module._Compiler, "run", failing)
    engine = chain_engine(("ab",))
    with pytest.raises(RuntimeError, match="out of memory"):
        compile_all(engine)
    assert "is not compiled: out of memory" in caplog.text
    assert engine.generate([Request(tuple(b"a"), max_tokens=2, temperature=0.0)])[0].text == "ba"


def test_no_two_threads_compile_a_program_and_nothing_begins_while_the_engine_waits():
    programs, order = Programs(), []
    began, go_on = threading.Event(), threading.Event()

    def ahead(*program, pause=False):
        with programs.use(*program, ahead=True):
            order.append(("ahead", *program))
            began.set()
            if pause:
                assert go_on.wait(SECONDS)

    def needed(*program):
        with programs.use(*program):
            order.append(("needed", *program))

    first = threading.Thread(target=ahead, args=("decode", 1), kwargs={"pause": True})
    first.start()
    assert began.wait(SECONDS)
    engine = threading.Thread(target=needed, args=("decode", 1))
    engine.start()
    while not programs._needed:
        time.sleep(0.001)
    other = threading.Thread(target=ahead, args=("decode", 8))
    other.start()
    other.join(0.05)
    assert order == [("ahead", "decode", 1)]
    go_on.set()
    for thread in (first, engine, other):
        thread.join(SECONDS)
    assert order[1] == ("needed", "decode", 1) and order[2] == ("ahead", "decode", 8)
    assert programs.compiled == 2


def test_a_failed_compilation_is_tried_again():
    programs = Programs()
    with pytest.raises(RuntimeError), programs.use("decode", 1):
        raise RuntimeError
    assert programs.compiled == 0
    with programs.use("decode", 1):
        pass
    assert programs.compiled == 1
