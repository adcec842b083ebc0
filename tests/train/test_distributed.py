"""Several processes: the same losses as one, whatever the mesh, and checkpoints that any number of
them can go on with.
"""

import os
import shutil
import signal
import socket
import time

import numpy as np
import pytest
from small_line import MODEL, errors_of, lines, losses, make_base, run, start

from nanochat_jax.train.stopping import EXIT_STOPPED

pytestmark = pytest.mark.slow
STEPS = 4
FLAGS = [
    *MODEL,
    "--total-batch-size",
    "1024",
    "--device-batch-size",
    "1",
    "--num-iterations",
    str(STEPS),
    "--save-every",
    "2",
    "--keep",
    "3",
    "--eval-every",
    "-1",
    "--eval-tokens",
    "512",
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def one(paths):
    """One process with 8 devices."""
    run("base_train", *FLAGS, "--mesh", "8x1", "--model-tag", "one", base=paths.base, devices=8)
    return paths.checkpoints("base") / "one"


@pytest.fixture(scope="module")
def two(paths):
    """Two processes with 4 devices each."""
    run(
        "base_train",
        *FLAGS,
        "--mesh",
        "8x1",
        "--model-tag",
        "two",
        base=paths.base,
        devices=4,
        processes=2,
    )
    return paths.checkpoints("base") / "two"


def assert_equal_runs(found, expected):
    np.testing.assert_allclose(losses(found), losses(expected), rtol=1e-5)
    assert len(losses(found)) == STEPS
    bpb = [[line["val_bpb"] for line in lines(each, "eval")] for each in (found, expected)]
    np.testing.assert_allclose(*bpb, rtol=1e-5)


def test_two_processes_train_as_one_and_hand_over_to_one(paths, one, two):
    assert_equal_runs(two, one)
    handed = shutil.copytree(two, two.with_name("handed"))
    shutil.rmtree(handed / "4")  # as if killed before the last save
    run(
        "base_train",
        *FLAGS,
        "--mesh",
        "4x2",
        "--model-tag",
        "handed",
        "--resume",
        base=paths.base,
        devices=8,
    )
    assert_equal_runs(handed, one)


def test_a_step_that_one_process_cannot_read_is_passed_over_by_all(paths, one, two):
    torn = shutil.copytree(two, two.with_name("torn"))
    # the share of process 1
    for file in (torn / "4" / "optimizer" / "ocdbt.process_1" / "d").iterdir():
        os.truncate(file, file.stat().st_size // 2)
    said = run(
        "base_train",
        *FLAGS,
        "--mesh",
        "8x1",
        "--model-tag",
        "torn",
        "--resume",
        base=paths.base,
        devices=4,
        processes=2,
    )
    assert f"{torn / '4'} cannot be read (process 1: " in said
    assert (torn / "damaged-4").is_dir() and (torn / "4").is_dir()
    assert_equal_runs(torn, one)


def test_a_model_axis_over_both_processes_takes_over_from_one(paths, one):
    both = shutil.copytree(one, one.with_name("both"))
    shutil.rmtree(both / "4")
    run(
        "base_train",
        *FLAGS,
        "--mesh",
        "1x8",
        "--model-tag",
        "both",
        "--resume",
        base=paths.base,
        devices=4,
        processes=2,
    )
    assert_equal_runs(both, one)


def test_a_preempted_process_stops_all_of_them_at_one_step(paths):
    long = [*FLAGS, "--num-iterations", "100000", "--save-every", "0"]
    running = start(
        "base_train",
        *long,
        "--mesh",
        "8x1",
        "--model-tag",
        "preempted",
        base=paths.base,
        devices=4,
        processes=2,
    )
    directory = paths.checkpoints("base") / "preempted"
    deadline = time.monotonic() + 300
    while not ((directory / "metrics.jsonl").exists() and losses(directory)):
        assert time.monotonic() < deadline and running[0].poll() is None
        time.sleep(0.1)
    running[1].send_signal(signal.SIGTERM)
    said = errors_of(running)
    assert [process.returncode for process in running] == [EXIT_STOPPED] * 2, said
    (step,) = (int(name) for name in os.listdir(directory) if name.isdigit())
    assert len(losses(directory)) == step


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_others_with_an_error(paths, victim):
    long = [*FLAGS, "--num-iterations", "100000", "--save-every", "0"]
    tag = f"dead-{victim}"
    running = start(
        "base_train",
        *long,
        "--mesh",
        "8x1",
        "--model-tag",
        tag,
        base=paths.base,
        devices=4,
        processes=2,
    )
    directory = paths.checkpoints("base") / tag
    deadline = time.monotonic() + 300
    while not ((directory / "metrics.jsonl").exists() and losses(directory)):
        assert time.monotonic() < deadline and running[0].poll() is None
        time.sleep(0.1)
    running[victim].kill()
    _, said = running[1 - victim].communicate(timeout=150)
    assert running[1 - victim].returncode not in (0, EXIT_STOPPED), said
    running[victim].communicate()


def test_flags_name_the_processes_as_the_environment_does(paths, one):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [
        start(
            "base_train",
            *FLAGS,
            "--mesh",
            "8x1",
            "--model-tag",
            "flags",
            "--coordinator",
            f"127.0.0.1:{port}",
            "--num-processes",
            "2",
            "--process-id",
            str(index),
            base=paths.base,
            devices=4,
        )[0]
        for index in range(2)
    ]
    said = errors_of(running)
    assert [process.returncode for process in running] == [0, 0], said
    assert_equal_runs(one.with_name("flags"), one)
    assert "in 4 steps" in said[0] and "in 4 steps" not in said[1]


@pytest.mark.parametrize(
    "flags",
    [
        ["--coordinator", "here"],
        ["--num-processes", "2"],
        ["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"],
    ],
)
def test_half_of_the_flags_is_a_mistake(paths, flags):
    (process,) = start("base_train", *FLAGS, *flags, base=paths.base)
    said = process.communicate()[1]
    assert process.returncode == 2 and said.count("\n") == 1 and "--process-id" in said
