"""The container files, without an engine: they agree with each other and with the package."""

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from nanochat_jax import cli
from nanochat_jax.dataset import HfConfig
from nanochat_jax.errors import UsageError
from nanochat_jax.speedrun.plan import SpeedrunConfig
from scripts.serve import Config as ServeConfig

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE = sorted(DOCKER.glob("docker-compose.*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VOLUME = "/root/.cache/nanochat"
ECHO = '#!/bin/sh\nprintf "%s\\n" "$@"\n'  # prints its arguments, one a line


def arguments(name):
    """Arguments of the Dockerfile's instructions of a name."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [line.split(maxsplit=1)[1] for line in lines if line.startswith(f"{name} ")]


def copied():
    """What the Dockerfile takes from the checkout."""
    lines = [rest.split()[:-1] for rest in arguments("COPY") if "--from" not in rest]
    return [word for words in lines for word in words if not word.startswith("--")]


def services(path):
    return yaml.safe_load(path.read_text())["services"]


def test_the_build_gets_what_is_copied_and_the_wheel_needs():
    lines = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and line[0] != "#"]
    admitted = [rule[1:] for rule in rules if rule[0] == "!"]
    assert rules[0] == "*" and sorted(admitted) == sorted(copied())
    assert all((ROOT / path).exists() for path in copied())
    maturin, project = PROJECT["tool"]["maturin"], PROJECT["project"]
    licences = {path.split("/")[0] for path in project["license-files"]}
    crate = maturin["manifest-path"].split("/")[0]
    needed = {"pyproject.toml", project["readme"], crate, *licences, *maturin["python-packages"]}
    assert needed <= set(copied())


def test_the_image_has_an_allowed_python_and_its_variants_are_extras():
    version = dict(argument.split("=") for argument in arguments("ARG"))["PYTHON"]
    bounds = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["project"]["requires-python"])
    assert int(bounds[1]) <= int(version.removeprefix("3.")) < int(bounds[2])
    run = next(rest for rest in arguments("RUN") if "VARIANT" in rest)
    variants = re.search(r"in ([a-z0-9|-]+)\)", run)[1].split("|")
    assert {*variants, "offline", "wandb"} <= set(PROJECT["project"]["optional-dependencies"])
    check = run[run.index("case") : run.index("esac") + 4]
    for variant, code in [*((variant, 0) for variant in variants), ("rocm", 1), ("", 1)]:
        done = subprocess.run(["bash", "-c", check], env={"VARIANT": variant}, capture_output=True)
        assert done.returncode == code


def test_the_page_is_published_on_this_machine_only_by_default():
    for service in services(DOCKER / "docker-compose.web.yml").values():
        assert service["ports"] == ["${WEB_ADDRESS:-127.0.0.1}:${WEB_PORT:-8000}:8000"]
    assert arguments("EXPOSE") == ["8000"]


@pytest.fixture
def started(tmp_path):
    """Module and arguments that a container's script gives to `python`."""
    (tmp_path / "python").write_text(ECHO)
    (tmp_path / "python").chmod(0o755)

    def start(script, *argv, **env):
        env["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
        command = [DOCKER / script, *argv]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        _, module, *argv = done.stdout.splitlines()
        return module, argv

    return start


@pytest.mark.parametrize(
    "env, source, tag, step",
    [
        ({}, "sft", None, None),
        # what compose passes by default
        ({"MODEL_SOURCE": "sft", "MODEL_TAG": "", "MODEL_STEP": ""}, "sft", None, None),
        ({"MODEL_SOURCE": "rl", "MODEL_TAG": "mine", "MODEL_STEP": "210"}, "rl", "mine", 210),
    ],
)
def test_the_environment_of_the_container_chooses_the_model(started, env, source, tag, step):
    module, argv = started("web.sh", "--slots", "2", **env)
    config = cli.parse(ServeConfig, argv, prog=module, description="")
    assert module == "scripts.serve"
    assert (config.source, config.model_tag, config.step) == (source, tag, step)
    assert (config.host, config.port, config.slots) == ("0.0.0.0", 8000, 2)


def test_a_blank_in_the_environment_of_the_container_does_not_split_an_argument(started):
    module, argv = started("web.sh", MODEL_TAG="my --port 1")
    assert argv[argv.index("--model-tag") + 1] == "my --port 1"
    with pytest.raises(UsageError, match="'my --port 1' is not a name"):
        cli.parse(ServeConfig, argv, prog=module, description="")


@pytest.mark.parametrize(
    "given, module",
    [
        ("", "scripts.speedrun"),
        ("--depth 12", "scripts.speedrun"),
        ("-d 12", "scripts.speedrun"),
        ("python -m nanochat_jax.dataset hf --preset k12", "nanochat_jax.dataset"),
    ],
)
def test_the_trainer_runs_the_speedrun_with_flags_or_another_command(started, given, module):
    ran, argv = started("train.sh", *given.split())
    assert ran == module and argv == given.split()[3 if "python" in given else 0 :]
    if module == "scripts.speedrun":
        cli.parse(SpeedrunConfig, argv, prog=module, description="")
    else:
        cli.parse(HfConfig, argv[1:], prog=module, description="")


@pytest.mark.parametrize(("given", "depth"), [(["--run", "a b"], 32), (["--depth", "34"], 34)])
def test_run1000_is_the_speedrun_at_depth_32_and_takes_its_flags(tmp_path, given, depth):
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "scripts/setup_env.sh").write_text("setup_env() { :; }\n")
    python = tmp_path / ".venv/bin/python"
    python.write_text(ECHO)
    python.chmod(0o755)
    shutil.copy(ROOT / "run1000.sh", tmp_path)
    command = ["bash", tmp_path / "run1000.sh", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    module, *argv = done.stdout.splitlines()[1:]
    config = cli.parse(SpeedrunConfig, argv, prog=module, description="")
    assert module == "scripts.speedrun" and config.depth == depth


@pytest.mark.parametrize(
    "path, name", [pytest.param(path, name, id=name) for path in COMPOSE for name in services(path)]
)
def test_a_service_agrees_with_the_image(path, name):
    service = services(path)[name]
    build = service["build"]
    context = (path.parent / build["context"]).resolve()
    assert context == ROOT and (context / build["dockerfile"]) == DOCKER / "Dockerfile"
    assert set(build["args"]) <= {argument.split("=")[0] for argument in arguments("ARG")}
    variant = build["args"]["VARIANT"]
    assert service["image"] == f"nanochat-jax:{variant}"  # the variants do not overwrite each other
    assert service["volumes"] == [f"nanochat_cache:{VOLUME}"] and service["shm_size"] == "1g"
    assert arguments("VOLUME") == [VOLUME] and f"NANOCHAT_BASE_DIR={VOLUME}" in arguments("ENV")[-1]
    resources = service.get("deploy", {}).get("resources", {})
    reserved = (
        [device["capabilities"] for device in resources["reservations"]["devices"]]
        if (resources)
        else []
    )
    assert reserved == ([["gpu"]] if variant == "gpu" else [])
    assert ("profiles" in service) == (variant == "cpu")  # one service starts without a name


def compose_commands():
    """The words of every `docker compose` command in the documents and in the compose files."""
    for path in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", *COMPOSE]:
        text = path.read_text().replace("\\\n", " ")
        for found in re.finditer(r"docker compose (-f .*?)(?=  +#|;|`|$)", text, re.MULTILINE):
            yield path.name, shlex.split(found[1])


def test_the_commands_of_the_guide_name_services_and_what_they_can_run(started):
    commands = list(compose_commands())
    assert len(commands) > 5 and any(words[2] == "run" for _, words in commands)
    for _, (_, file, action, *rest) in commands:
        names = [word for word in rest if not word.startswith("-")]
        service = services(ROOT / file)[names[0]]
        assert action in ("up", "run")
        argv = rest[rest.index(names[0]) + 1 :]
        if action == "run":
            assert service["entrypoint"] == ["nanochat-train"] and argv
            module, argv = started("train.sh", *argv)
            parser = {"scripts.speedrun": SpeedrunConfig, "nanochat_jax.dataset": HfConfig}[module]
            argv = argv[1:] if parser is HfConfig else argv
            cli.parse(parser, argv, prog=module, description="")
        else:
            assert not argv


def test_the_image_has_the_commands_of_its_services():
    assert arguments("CMD") == ['["nanochat-web"]']
    for name in ("web", "train"):
        target = f"docker/{name}.sh /usr/local/bin/nanochat-{name}"
        assert any(rest.endswith(target) for rest in arguments("COPY"))
        assert (DOCKER / f"{name}.sh").stat().st_mode & stat.S_IXUSR
    for service in services(DOCKER / "docker-compose.train.yml").values():
        assert service["entrypoint"] == ["nanochat-train"] and service["command"] == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cargo") is None, reason="needs cargo")
def test_the_steps_of_the_image_work_in_a_plain_directory(tmp_path):
    source, wheels, site, binaries = (tmp_path / name for name in ("src", "wheels", "site", "bin"))
    for name in copied():
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        if not name.startswith("docker/"):
            source.mkdir(exist_ok=True)
            copy(ROOT / name, source / name)
    shutil.rmtree(source / "rustbpe/target", ignore_errors=True)
    env = os.environ | {"PATH": f"{binaries}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env |= {"CARGO_TARGET_DIR": str(ROOT / "rustbpe/target"), "PYTHONPATH": str(site)}
    env |= {"NANOCHAT_BASE_DIR": str(tmp_path / "base")}

    def run(command, where):
        command = command.replace("/wheels", str(wheels))
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=where,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    [build] = [rest for rest in arguments("RUN") if "pip wheel" in rest]
    wheels.mkdir()
    # 0 is off: pip then builds with the maturin of this environment, without a network
    run(f"PIP_NO_BUILD_ISOLATION=0 {build}", source)
    run(f"pip install --no-deps --target {site} $(echo /wheels/*.whl)", tmp_path)
    binaries.mkdir()
    for name in ("web", "train"):
        shutil.copy(DOCKER / f"{name}.sh", binaries / f"nanochat-{name}")
    (empty := tmp_path / "workspace").mkdir()
    where = "import nanochat_jax.rustbpe as r; print(r.__file__)"
    assert str(site) in run(f"nanochat-train python -c '{where}'", empty)
    assert "base_train" in run("nanochat-train --depth 4 --dry-run", empty)
    assert "usage:" in run("nanochat-train python -m nanochat_jax.dataset hf --help", empty)
    assert "--slots" in run("nanochat-web --help", empty)
