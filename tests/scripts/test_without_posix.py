"""Inference without the modules that only POSIX systems have, and without Grain, as on Windows."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from nanochat_jax.interop.hf import write_hf
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.weights import init_params
from nanochat_jax.speedrun.plan import SpeedrunConfig
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import config
from nanochat_jax.train.pretrain import BaseTrainConfig

TOKENIZER = Tokenizer({bytes([byte]): byte for byte in range(256)})
CONFIG = GPTConfig.classic(
    1, n_embd=32, n_head=1, n_kv_head=1, sequence_len=64, vocab_size=TOKENIZER.vocab_size
)
# Runs commands in one process, in which some modules cannot be imported.
RUN = """
import runpy, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "grain"):
    sys.modules[name] = None
for command in sys.argv[1].split("|"):
    sys.argv = command.split()
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        assert not ended.code, (command, ended.code)
import nanochat_jax
from nanochat_jax.serve import server, terminal
model = nanochat_jax.load(sys.argv[-1])
print("generated", len(model.generate([1, 2], max_tokens=3)))
"""


def test_models_are_imported_exported_and_answer(tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    write_hf(model, CONFIG, init_params(CONFIG, jax.random.key(0)), TOKENIZER)
    commands = (
        f"scripts.import_weights --from {model} --source sft --model-tag x",
        "scripts.chat_cli -p Hi --max-tokens 4",
        "scripts.serve --help",
        f"scripts.export_weights --format hf --out {out}",
    )
    done = subprocess.run(
        [sys.executable, "-c", RUN, "|".join(commands)],
        env=os.environ | {"NANOCHAT_BASE_DIR": str(tmp_path / "base")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "generated" in done.stdout and "--port" in done.stdout
    assert (out / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_training_on_windows_is_refused_with_a_remedy(monkeypatch):
    monkeypatch.setattr(config, "os", SimpleNamespace(name="nt"))
    for config_type in (BaseTrainConfig, SpeedrunConfig):
        with pytest.raises(ValueError, match="on Windows, use WSL2 or a container"):
            config_type()
