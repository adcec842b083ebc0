"""A stage of the pipeline, and the key that tells whether it is finished."""

import hashlib
import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of the pipeline.

    `args` decide the result and are part of the key; `placement` (mesh, logging, batch per device)
    is not. Later stages build on a stage with `produces`. A `background` stage runs beside the
    later ones, until the one that `waits_for` it.
    """

    name: str
    module: str
    args: tuple[str, ...] = ()
    placement: tuple[str, ...] = ()
    produces: bool = False
    checkpoints: str = ""  # directory of its checkpoints under the base directory, if any
    background: bool = False
    waits_for: str = ""
    note: str = ""  # for the plan: model size, tokens, steps
    seconds: float = 0.0  # estimated; 0: unknown

    def command(self, *more: str) -> list[str]:
        return [sys.executable, "-m", self.module, *self.args, *self.placement, *more]

    def text(self) -> str:
        return shlex.join(["python", *self.command()[1:]])


def stage_keys(stages: Iterable[Stage], run: str) -> dict[str, str]:
    """A key per stage: a hash of its command and of those of the producing stages before it."""
    keys, chain = {}, run
    for stage in stages:
        content = json.dumps([chain, stage.module, stage.args])
        keys[stage.name] = hashlib.sha256(content.encode()).hexdigest()
        if stage.produces:
            chain = keys[stage.name]
    return keys
