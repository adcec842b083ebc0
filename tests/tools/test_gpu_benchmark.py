"""The GPU benchmark: rehearsed on a CPU without the packages that a bare GPU image lacks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from benchmarks.gpu import program
from benchmarks.gpu.checks import relative_errors
from benchmarks.gpu.plan import PHASES
from benchmarks.gpu.record import FILE_NAME, Recorder, read_results
from nanochat_jax.model.attention import causal_attention
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.recipe import derive_recipe
from nanochat_jax.train.pretrain import BaseTrainConfig, optimizer_parts

ROOT = Path(__file__).parents[2]

# Of what is installed, only these packages can be imported: the image's, and what they need.
SITECUSTOMIZE = """
import os, signal, sys, time

ALLOWED = {"jax", "jaxlib", "flax", "optax", "numpy", "rich", "yaml",
           "absl", "markdown_it", "mdurl", "ml_dtypes", "msgpack", "opt_einsum", "pygments",
           "scipy", "treescope", "typing_extensions", "nanochat_jax", "benchmarks"}
BROKEN = json_of_broken


class Allowed:
    def __init__(self, finder):
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        known = ALLOWED | sys.stdlib_module_names
        known |= {top} if top.startswith("_sysconfigdata") else set()  # of the standard library too
        if top not in known or name.endswith("rustbpe"):
            return None
        how = BROKEN.get(name)
        if how == "raises":
            raise RuntimeError("broken on purpose\\nin two lines")
        if how == "hangs":
            time.sleep(600)
        if how == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        return self._finder.find_spec(name, path, target)


sys.meta_path[:] = map(Allowed, sys.meta_path)
"""


def run_benchmark(folder, *flags, broken=None):
    """The finished process and its results; `broken` says what importing a module does."""
    hooks = folder / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(
        SITECUSTOMIZE.replace("json_of_broken", json.dumps(broken or {}))
    )
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {
        "PYTHON": sys.executable,
        "JAX_PLATFORMS": "cpu",
        "OUT": str(folder / "out"),
        "PYTHONPATH": str(hooks),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    done = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", "--tiny", "--cache", folder / "cache", *flags],
        capture_output=True,
        text=True,
        env=env,
        cwd=folder,
        timeout=1500,
    )
    return done, read_results(folder / "out" / FILE_NAME)


def named(results, name, phase=None):
    return [line for line in results if line["name"] == name and phase in (None, line["phase"])]


@pytest.mark.slow
def test_every_phase_runs_with_the_packages_of_a_bare_image(tmp_path):
    done, results = run_benchmark(tmp_path, "--limit-scale", "4")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    ends = named(results, "end")
    assert [(end["phase"], end["run"], end["status"]) for end in ends] == [
        (phase.name, run.name, "ok") for phase in PHASES for run in phase.runs
    ]
    assert {(line["phase"], line["name"]) for line in results if line.get("value") == "no GPU"} == {
        ("attention", "cudnn"),
        ("repeat", "against the CPU"),
        ("decode", "command buffers"),
        ("float8", "float8 matmul"),
    }
    assert "torch" in named(results, "torch")[0]["value"]  # the line that says why

    assert len(named(results, "relative error")) == 7 and not any(
        line.get("ok") is False for line in results
    )
    assert named(results, "same bits", "repeat")[0]["same"]
    steps = named(results, "step", "train")
    assert [step["run"] for step in steps] == ["rows16", "rows32"]
    for step in steps:
        # Random tokens: the first loss is that of a uniform guess.
        assert step["first_loss"] == pytest.approx(math.log(512), abs=0.05)
        assert step["tokens"] == 2 * 2 * 256 and step["peak_gib"] > 0 and step["mfu"] is None
        assert step["tokens_per_second"] == pytest.approx(1e3 * step["tokens"] / step["ms"])
    for trace in named(results, "trace"):
        times = [milliseconds for _, milliseconds, _ in trace["kernels"]]
        assert 0 < len(times) <= 30 and times == sorted(times, reverse=True)
    assert {line["matmul"] for line in named(results, "matmul", "float8")} == {
        "forward",
        "d_x",
        "d_w",
    }
    # Rounding to e4m3 or e5m2 moves each operand by up to 1/16 or 1/8 of itself.
    assert all(0.01 < line["relative_error"] < 0.125 for line in named(results, "matmul", "float8"))
    assert list((tmp_path / "cache").glob("*-cache"))
    assert "train/rows16" in done.stdout and "0 failed or wrong" in done.stdout


@pytest.mark.slow
def test_a_phase_that_hangs_crashes_or_raises_is_recorded_and_passed_over(tmp_path):
    # The phases in the order in which they run, each broken in its own way, and one that works.
    broken = {
        "benchmarks.gpu.checks": "hangs",
        "benchmarks.gpu.training": "crashes",
        "benchmarks.gpu.decoding": "raises",
    }
    done, results = run_benchmark(
        tmp_path, "--phases", "float8,device,train,decode", "--limit-scale", "0.4", broken=broken
    )
    assert done.returncode == 1
    ends = {(end["phase"], end["status"]): end for end in named(results, "end")}
    hung, crashed, raised, works = (
        ends[key]
        for key in (
            ("device", "timeout"),
            ("train", "failed"),
            ("decode", "failed"),
            ("float8", "ok"),
        )
    )
    assert hung["error"] == "no end within 8 s" and 7.5 < hung["took"] < 12
    assert crashed["error"] == "killed by SIGSEGV"
    assert raised["error"] == "RuntimeError: broken on purpose in two lines"
    assert named(results, "matmul", "float8") and works["limit"] > 24  # what others left over

    logs = [(tmp_path / "out" / end["log"]).read_text() for end in (hung, crashed, raised)]
    assert "Timeout" in logs[0] and "find_spec" in logs[0]  # where it hung
    assert "Segmentation fault" in logs[1] and "Traceback" in logs[2]
    assert "!! device" in done.stdout and "6 failed or wrong" in done.stdout


def test_the_optimizer_is_that_of_base_training(monkeypatch):
    calls = []
    monkeypatch.setattr(program, "make_optimizer", lambda *a: calls.append(a))
    config, reference = (GPTConfig.modern(depth, vocab_size=32768) for depth in (20, 12))
    program.modern_optimizer(config, Compute())
    ((_, rates, found, _),) = calls
    recipe = derive_recipe(config, reference=reference, weight_decay=0.28)
    expected_rates, expected = optimizer_parts(BaseTrainConfig(depth=20), recipe)
    assert rates == expected_rates and found.lr_scale == expected.lr_scale
    for name in ("lr_multiplier", "momentum", "weight_decay"):
        for step in (0, 20, 39, 300, recipe.num_iterations // 2, recipe.num_iterations - 1):
            assert float(getattr(found, name)(step)) == float(getattr(expected, name)(step))


def test_bytes_per_token_count_what_the_windows_reach():
    decoding = program.Decoding(GPTConfig.modern(20), rows=32, tokens=32)
    found = decoding.bytes_per_token()
    width = decoding.dtype.itemsize
    entry = 2 * 1280 * width * 32  # key and value of one position, all rows
    keys = 15 * (512 + 1) + 5 * (2048 - 16)  # SSSL five times
    assert found["cache_windowed"] == keys * entry
    assert found["cache_full"] == 20 * 2048 * entry
    blocks = 20 * 12 * 1280**2 + 10 * 12 * 10  # matrices, and gates of value embeddings
    assert found["weights"] == width * (blocks + 32768 * 1280)


def test_an_attention_with_a_window_off_by_one_is_noticed():
    keys = jax.random.split(jax.random.key(1), 4)
    arrays = [
        jax.random.normal(key, (2, 100, heads, 128), jnp.bfloat16)
        for key, heads in zip(keys, (4, 2, 2, 4), strict=True)
    ]
    right = relative_errors(causal_attention, 25, arrays)
    wrong = relative_errors(
        lambda *qkv, window: causal_attention(*qkv, window=window + 1), 25, arrays
    )
    assert max(right.values()) < 0.008 < min(wrong.values())


def event(name, start, duration):
    return SimpleNamespace(name=name, start_ns=start, duration_ns=duration)


def test_limits_add_up_to_less_than_nine_minutes():
    assert sum(phase.seconds for phase in PHASES) <= 530


def test_results_are_appended_and_a_last_line_that_was_cut_off_is_left_out(tmp_path, capsys):
    Recorder(tmp_path, "a", "b", 0.0)("first", value=1, ok=False)
    size = (tmp_path / FILE_NAME).stat().st_size
    Recorder(tmp_path, "a", "c", 0.0)("second", kernels=[["x", 1.0, 2]])
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"name": "thi')
    found = read_results(tmp_path / FILE_NAME)
    assert [(line["run"], line["name"]) for line in found] == [("b", "first"), ("c", "second")]
    assert [line["name"] for line in read_results(tmp_path / FILE_NAME, size)] == ["second"]
    assert "a/b first: value 1, ok NO" in capsys.readouterr().out
