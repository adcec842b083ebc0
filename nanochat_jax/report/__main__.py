"""Commands that start and generate the report of a run.

python -m nanochat_jax.report reset         before a run: delete old sections, record the start
python -m nanochat_jax.report generate      after it: report.md, report.html and results.json
"""

from pathlib import Path

from nanochat_jax import cli
from nanochat_jax.cli import NoFlags
from nanochat_jax.paths import Paths
from nanochat_jax.report import document


def reset(_: NoFlags) -> None:
    report_dir = Paths.from_env().report
    document.reset(report_dir)
    print(f"report reset: {report_dir}")


def generate(_: NoFlags) -> None:
    report_dir = Paths.from_env().report
    document.generate(report_dir, Path.cwd())
    print(
        f"wrote report.md, report.html and results.json to {report_dir}; the first two also to "
        f"{Path.cwd()}"
    )


COMMANDS = {
    "generate": (
        generate,
        NoFlags,
        "Write the report of a training run. Commands: generate (the default), reset.",
    ),
    "reset": (reset, NoFlags, "Start the report of a new run: delete the last run's sections."),
}

if __name__ == "__main__":
    cli.run_commands(COMMANDS, default="generate", prog="nanochat_jax.report")
