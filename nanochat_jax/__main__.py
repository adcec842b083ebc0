"""All commands of the project under one name, also for an installed wheel.

nanochat serve --port 8080              the same as `python -m scripts.serve --port 8080`
python -m nanochat_jax speedrun         if the console script is not on PATH
"""

import pkgutil
import runpy
import sys

import scripts
from nanochat_jax import cli
from nanochat_jax.errors import UsageError

# commands that are not scripts
MODULES = {"dataset": "nanochat_jax.dataset", "report": "nanochat_jax.report"}


def commands() -> dict[str, str]:
    """Module of each command, by name."""
    names = (module.name for module in pkgutil.iter_modules(scripts.__path__))
    return dict(sorted(({name: f"scripts.{name}" for name in names} | MODULES).items()))


def main() -> None:
    cli.guard(run_command)


def run_command() -> None:
    """Run the command named by the first argument; `_` and `-` are the same."""
    names = commands()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(
            "usage: nanochat COMMAND [flags]; its flags: nanochat COMMAND --help\n\n"
            f"commands: {', '.join(names)}"
        )
        return
    module = names.get(name.replace("-", "_"))
    if module is None:
        raise UsageError(f"no command {name!r}; the commands are {', '.join(names)}")
    del sys.argv[1]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
