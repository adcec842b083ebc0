"""Train a chat model from nothing: data, tokenizer, all training stages, evaluation, report.

python -m scripts.speedrun                  no accelerator: a small model, no network needed
python -m scripts.speedrun --with-rl        the same, then reinforcement learning
python -m scripts.speedrun --mesh 8x1       on 8xH100: the d20 model on FineWeb-Edu or ClimbMix
python -m scripts.speedrun --recipe record  d24 as upstream trained its record in 2026
python -m scripts.speedrun --dry-run        print the commands and estimated times

The commands are in nanochat_jax/speedrun/recipes.py.
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from nanochat_jax import cli
from nanochat_jax.errors import UsageError
from nanochat_jax.files import lock_file, make_directory
from nanochat_jax.paths import DATA_DIRS, Paths
from nanochat_jax.speedrun.machine import Machine
from nanochat_jax.speedrun.plan import SpeedrunConfig, plan_stages, print_plan
from nanochat_jax.speedrun.runner import Record, run_stages
from nanochat_jax.speedrun.stages import Stage


def next_commands(stages: Sequence[Stage], paths: Paths) -> str:
    """Commands to chat with the final model; "" if the pipeline made none."""
    checkpoints = {stage.name: stage.checkpoints for stage in stages}
    source = next((name for name in ("rl", "sft") if f"chat_{name}" in checkpoints), None)
    if source is None:
        return ""
    tag = Path(checkpoints[f"chat_{source}"]).name
    flags = ["-i", source] if source != "sft" else []
    flags += ["-g", tag] if paths.find_tag(source) != tag else []

    def command(script: str) -> str:
        # `speedrun.sh` runs .venv/bin/python, which is not `python` in the user's shell
        python = f"{shlex.quote(sys.orig_argv[0])} "
        return " ".join([re.sub("^python ", python, cli.invocation(f"scripts.{script}")), *flags])

    return f"talk to the model:  {command('chat_cli')}\nor in the browser:  {command('serve')}"


def main(config: SpeedrunConfig) -> int:
    paths = Paths.from_env()
    if paths.bucket:
        raise UsageError(
            "speedrun keeps its record and its checkpoints on one machine: unset "
            "NANOCHAT_CHECKPOINT_DIR, or run the stages one by one"
        )
    machine = Machine.probe(config.device_type)
    if config.device_type:
        os.environ["JAX_PLATFORMS"] = config.device_type  # inherited by the stages
    run = config.run or os.environ.get("WANDB_RUN") or "dummy"
    on_disk = {
        name: max(0, len(list(paths.data(name).glob("*.parquet"))) - 1) for name in DATA_DIRS
    }
    stages, title = plan_stages(config, machine, run, on_disk)
    title = cli.with_flags(title, SpeedrunConfig)
    if config.dry_run:
        print_plan(stages, machine, title)
        return 0
    print(title, file=sys.stderr)
    for directory in (paths.report, *([Path.cwd()] if stages[-1].name == "report" else [])):
        make_directory(directory)  # the last stage writes there: fail now, not then
    lock = paths.base / ".speedrun.lock"
    with lock_file(lock, f"the speedrun of {paths.base}", "wait for it or stop it"):
        code = run_stages(stages, Record.open(paths, fresh=config.fresh))
    if code == 0 and (advice := next_commands(stages, paths)):
        print(advice, file=sys.stderr)
    return code


if __name__ == "__main__":
    cli.run(main, SpeedrunConfig, prog="scripts.speedrun", description=__doc__)
