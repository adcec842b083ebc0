"""The container files, without an engine: they name what exists, agree with each other and with
the package, and the scripts in them pass on what they are told. Whether the images build, the
workflow finds out, where Docker runs.
"""

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
from scripts.serve import Config as ServeConfig
from scripts.speedrun import SpeedrunConfig

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE = sorted(DOCKER.glob("docker-compose.*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VOLUME = "/root/.cache/nanochat"


def instructions():
    """(name, arguments) of each line of the Dockerfile, continued lines joined and comments
    dropped.
    """
    lines = [
        line
        for line in (DOCKER / "Dockerfile").read_text().splitlines()
        if not line.lstrip().startswith("#")
    ]
    logical = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in logical if line.strip()]


def arguments(name):
    return [rest for instruction, rest in instructions() if instruction == name]


def copied():
    """What the Dockerfile takes from the checkout."""
    lines = [rest.split()[:-1] for rest in arguments("COPY") if "--from" not in rest]
    return [word for words in lines for word in words if not word.startswith("--")]


def services(path):
    return yaml.safe_load(path.read_text())["services"]


ALL_SERVICES = [pytest.param(path, name, id=name) for path in COMPOSE for name in services(path)]


def test_everything_that_is_copied_exists_and_reaches_the_build():
    rules = [
        line
        for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
        if line and line[0] != "#"
    ]
    admitted = [rule[1:] for rule in rules if rule[0] == "!"]
    assert rules[0] == "*" and sorted(admitted) == sorted(copied())
    assert all((ROOT / path).exists() for path in copied())


def test_what_the_wheel_is_made_of_is_copied():
    maturin = PROJECT["tool"]["maturin"]
    licences = {path.split("/")[0] for path in PROJECT["project"]["license-files"]}
    wanted = {
        "pyproject.toml",
        PROJECT["project"]["readme"],
        *licences,
        *maturin["python-packages"],
        maturin["manifest-path"].split("/")[0],
    }
    assert wanted <= set(copied())


def test_the_python_of_the_image_is_one_that_the_package_allows():
    version = dict(argument.split("=") for argument in arguments("ARG"))["PYTHON"]
    low, high = re.fullmatch(
        r">=3\.(\d+),<3\.(\d+)", PROJECT["project"]["requires-python"]
    ).groups()
    assert int(low) <= int(version.removeprefix("3.")) < int(high)


def test_every_variant_is_an_extra_and_no_other_is_taken():
    run = next(rest for rest in arguments("RUN") if "VARIANT" in rest)
    variants = re.search(r"in ([a-z|]+)\)", run)[1].split("|")
    assert {*variants, "offline", "wandb"} <= set(PROJECT["project"]["optional-dependencies"])
    check = run[run.index("case") : run.index("esac") + 4]
    for variant, code in [*((variant, 0) for variant in variants), ("rocm", 1), ("", 1)]:
        done = subprocess.run(
            ["bash", "-c", check], env={"VARIANT": variant}, stderr=subprocess.DEVNULL
        )
        assert done.returncode == code


@pytest.mark.parametrize("path, name", ALL_SERVICES)
def test_a_service_agrees_with_the_image(path, name):
    service = services(path)[name]
    build = service["build"]
    context = (path.parent / build["context"]).resolve()
    assert context == ROOT and (context / build["dockerfile"]) == DOCKER / "Dockerfile"
    assert set(build["args"]) <= {argument.split("=")[0] for argument in arguments("ARG")}
    # the two variants never overwrite each other
    assert service["image"] == f"nanochat-jax:{build['args']['VARIANT']}"
    assert service["volumes"] == [f"nanochat_cache:{VOLUME}"]
    assert arguments("VOLUME") == [VOLUME] and f"NANOCHAT_BASE_DIR={VOLUME}" in arguments("ENV")[-1]
    assert yaml.safe_load(path.read_text())["volumes"] == {
        "nanochat_cache": {"name": "nanochat_cache"}
    }
    reserved = (
        service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    )
    assert [device["capabilities"] for device in reserved] == (
        [["gpu"]] if build["args"]["VARIANT"] == "gpu" else []
    )


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_every_variable_is_explained_and_every_explained_variable_is_used(path):
    text = path.read_text()
    explained = set(re.findall(r"^# ([A-Z_]+)  +\S", text, re.MULTILINE))
    environments = [service["environment"] for service in services(path).values()]
    passed_on = {
        key for environment in environments for key, value in environment.items() if value is None
    }
    assert set(re.findall(r"\$\{([A-Z_]+):-", text)) | passed_on == explained
    assert "${" not in re.sub(r"\$\{[A-Z_]+:-[^}]*\}", "", text), "a variable without a default"


def test_only_one_service_starts_by_itself():
    for path in COMPOSE:
        assert (
            len([name for name, service in services(path).items() if "profiles" not in service])
            == 1
        )


def test_the_page_is_published_on_this_machine_alone_unless_told_otherwise():
    for service in services(DOCKER / "docker-compose.web.yml").values():
        assert service["ports"] == ["${WEB_ADDRESS:-127.0.0.1}:${WEB_PORT:-8000}:8000"]
    assert arguments("EXPOSE") == ["8000"]


@pytest.fixture
def echo(tmp_path):
    """A `python` first on PATH that prints its arguments, one a line."""
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    "env, source, tag, step",
    [
        ({}, "sft", None, None),
        # what compose passes by default
        ({"MODEL_SOURCE": "sft", "MODEL_TAG": "", "MODEL_STEP": ""}, "sft", None, None),
        (
            {"MODEL_SOURCE": "rl", "MODEL_TAG": "my-model", "MODEL_STEP": "210"},
            "rl",
            "my-model",
            210,
        ),
    ],
)
def test_the_environment_of_the_container_says_which_model_is_served(echo, env, source, tag, step):
    done = subprocess.run(
        [DOCKER / "web.sh", "--slots", "2"],
        capture_output=True,
        text=True,
        check=True,
        env=env | {"PATH": f"{echo}:{os.environ['PATH']}"},
    )
    module, *argv = done.stdout.splitlines()[1:]
    config = cli.parse(ServeConfig, argv, prog=module, description="")
    assert module == "scripts.serve" and (config.source, config.model_tag, config.step) == (
        source,
        tag,
        step,
    )
    assert (config.host, config.port, config.slots) == ("0.0.0.0", 8000, 2)


def test_a_blank_in_the_environment_of_the_container_does_not_split_an_argument(echo):
    """Such a tag is no name; it must reach the check whole, and not as flags of its own."""
    done = subprocess.run(
        [DOCKER / "web.sh"],
        capture_output=True,
        text=True,
        check=True,
        env={"MODEL_TAG": "my --port 1", "PATH": f"{echo}:{os.environ['PATH']}"},
    )
    module, *argv = done.stdout.splitlines()[1:]
    assert argv[argv.index("--model-tag") + 1] == "my --port 1"
    with pytest.raises(UsageError, match="'my --port 1' is not a name"):
        cli.parse(ServeConfig, argv, prog=module, description="")


def test_the_command_of_the_image_and_of_each_trainer_is_one_that_it_has():
    assert arguments("CMD") == ['["nanochat-web"]']
    for name in ("web", "train"):
        assert any(
            rest.endswith(f"docker/{name}.sh /usr/local/bin/nanochat-{name}")
            for rest in arguments("COPY")
        )
        assert (DOCKER / f"{name}.sh").stat().st_mode & stat.S_IXUSR
    for service in services(DOCKER / "docker-compose.train.yml").values():
        assert service["entrypoint"] == ["nanochat-train"] and service["command"] == []


@pytest.mark.parametrize(
    "given, module",
    [
        ([], "scripts.speedrun"),
        (["--depth", "12"], "scripts.speedrun"),
        (["-d", "12"], "scripts.speedrun"),
        (["python", "-m", "nanochat_jax.dataset", "hf", "--preset", "k12"], "nanochat_jax.dataset"),
    ],
)
def test_the_trainer_runs_the_speedrun_with_flags_or_another_command(echo, given, module):
    done = subprocess.run(
        [DOCKER / "train.sh", *given],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": f"{echo}:{os.environ['PATH']}"},
    )
    _, found, *argv = done.stdout.splitlines()
    assert found == module and argv == (given if module == "scripts.speedrun" else given[3:])
    if module == "scripts.speedrun":
        cli.parse(SpeedrunConfig, argv, prog=module, description="")
    else:
        cli.parse(HfConfig, argv[1:], prog=module, description="")


def test_every_service_has_shared_memory_and_the_plain_one_a_gpu():
    for path in COMPOSE:
        assert {service["shm_size"] for service in services(path).values()} == {"1g"}
        (plain,) = [service for service in services(path).values() if "profiles" not in service]
        # so that its devices are reserved, as tested above
        assert plain["build"]["args"]["VARIANT"] == "gpu"


def test_run1000_is_the_speedrun_at_depth_32_and_takes_its_flags(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "scripts/setup_env.sh").write_text("setup_env() { :; }\n")
    python = tmp_path / ".venv/bin/python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    shutil.copy(ROOT / "run1000.sh", tmp_path)
    for given, depth in (["--run", "a b"], 32), (["--depth", "34"], 34):
        done = subprocess.run(
            ["bash", tmp_path / "run1000.sh", *given], capture_output=True, text=True, check=True
        )
        module, *argv = done.stdout.splitlines()[1:]
        config = cli.parse(SpeedrunConfig, argv, prog=module, description="")
        assert module == "scripts.speedrun" and config.depth == depth


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    scripts = [
        *DOCKER.glob("*.sh"),
        ROOT / "run1000.sh",
        ROOT / "speedrun.sh",
        ROOT / "test.sh",
        ROOT / "scripts/setup_env.sh",
    ]
    command = [shellcheck, "-x", "-e", "SC2119", *scripts]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, f"{shlex.join(map(str, command))}\n{found.stdout}"


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    found = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_compose_files_keep_to_the_schema_of_compose():
    checker = shutil.which(
        "check-jsonschema", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if checker is None:
        pytest.skip("check-jsonschema is not installed")
    found = subprocess.run(
        [checker, "--builtin-schema", "vendor.compose-spec", *COMPOSE],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout
