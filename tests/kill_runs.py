"""Kill a training run repeatedly, at random moments and during saves, and compare it with one that
is never killed.

    python tests/kill_runs.py --kills 30

Every process is ended by SIGKILL and started again with --resume until the run is complete. Its
losses, data positions and all bits of its parameters and optimizer must equal those of the other
run, else the exit code is 1. The last line is JSON.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from small_line import MODEL, lines, make_base, run, saved_state, start

STEPS = 150
FLAGS = [*MODEL, *"--mesh 1x1 --total-batch-size 512 --device-batch-size 4".split()]
FLAGS += f"--num-iterations {STEPS} --save-every 2 --eval-every 50 --eval-tokens 512".split()


def outcome(directory: Path) -> tuple:
    """What must be equal: all metrics, and the last step's state with its arrays' checksums."""
    state = saved_state(directory, STEPS)
    return (
        lines(directory, "train"),
        lines(directory, "eval"),
        state["checksums"]["content"],
        state["position"],
        state["loop"]["minimum"],
        state["loop"]["smooth_loss"],
    )


def killed_run(directory: Path, base: Path, rng: random.Random, kills_left: int) -> list[bool]:
    """Run to the end under fire; for each kill, whether a save was on its way."""
    kills: list[bool] = []
    while True:
        (process,) = start(
            "base_train", *FLAGS, "--model-tag", directory.name, "--resume", base=base
        )
        if len(kills) < kills_left:
            in_save = rng.random() < 0.5
            # from the start of Python to some way into the run
            aims_at = time.monotonic() + rng.uniform(0, 8)
            while process.poll() is None:
                if time.monotonic() > aims_at and (not in_save or any(directory.glob("*tmp*"))):
                    time.sleep(rng.uniform(0, 0.02) if in_save else 0)
                    process.kill()
                    break
                time.sleep(0.0005)
        said = process.communicate()[1]
        if process.returncode == 0:
            return kills
        if process.returncode != -9:
            sys.exit(f"a run ended by itself with {process.returncode}:\n{said}")
        kills.append(any(directory.glob("*tmp*")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, kills, runs, equal = random.Random(options.seed), [], 0, True
    with tempfile.TemporaryDirectory() as scratch:
        paths = make_base(Path(scratch))
        root = paths.checkpoints("base")
        run("base_train", *FLAGS, "--model-tag", "alone", base=paths.base)
        expected = outcome(root / "alone")
        while len(kills) < options.kills:
            runs += 1
            kills += killed_run(root / f"killed{runs}", paths.base, rng, options.kills - len(kills))
            found = outcome(root / f"killed{runs}")
            same = found == expected
            equal &= same
            if not same:
                pairs = zip(found[0], expected[0], strict=False)
                first = next((line for line, other in pairs if line != other), None)
                print(f"first step that differs: {first}; then {found[2:]}, not {expected[2:]}")
            print(
                f"run {runs}: {len(kills)} kills so far, {sum(kills)} of them in a save; "
                f"{'equal to' if same else 'DIFFERENT from'} the run left alone",
                flush=True,
            )
    summary = dict(kills=len(kills), kills_in_a_save=sum(kills), runs=runs)
    print(json.dumps(summary | dict(steps=STEPS, equal=equal)))
    sys.exit(not equal)


if __name__ == "__main__":
    main()
