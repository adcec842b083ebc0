"""Compare final bits per byte with upstream's, for both architectures.

    NANOCHAT_TEST_DATA=DIR python benchmarks/parity.py [classic modern] [--precision fp8 int8]

Upstream's d4 runs come with the reference data: their settings, and their bits per byte at the last
step. Text, vocabulary, shape, batches and schedule are the same; initial weights differ, so the
figures agree to about the spread between seeds. With --precision the same runs are repeated with
low-precision matmuls, which a CPU emulates, and compared with our own float32 run. Prints a table,
then one JSON line; exit code 1 if a difference exceeds 0.03 bits per byte, or 0.01 between
precisions.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOLERANCE, PRECISION_TOLERANCE = 0.03, 0.01
ARCHS = ("classic", "modern")
# Upstream's settings that affect the result; the others are about logging, evaluating and saving.
SETTINGS = (
    *("depth", "aspect_ratio", "head_dim", "max_seq_len", "window_pattern"),
    *("num_iterations", "device_batch_size", "target_param_data_ratio", "total_batch_size"),
    *("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay", "grad_clip"),
    *("warmup_steps", "warmdown_ratio", "final_lr_frac", "eval_tokens"),
)


def train(arch: str, precision: str, reference: Path, corpus: Path) -> dict[str, float]:
    """Train like upstream's checkpoint in `reference`; returns figures of both."""
    meta = json.loads(next(reference.glob("meta_*.json")).read_text())
    with tempfile.TemporaryDirectory() as base:
        environment = os.environ | {"NANOCHAT_BASE_DIR": base}

        def run(module: str, *args: str) -> None:
            subprocess.run([sys.executable, "-m", module, *args], env=environment, check=True)

        shutil.copytree(corpus, Path(base) / "base_data")
        # imports the tokenizer
        run("scripts.import_weights", "--from", str(reference), "--model-tag", "upstream")
        settings = meta["user_config"]
        flags = [
            f"--{name.replace('_', '-')}={settings[name]}"
            for name in SETTINGS
            if settings.get(name) is not None
        ]
        start = time.perf_counter()
        low = "" if precision == "float32" else f"--precision {precision} "
        common = f"{low}--arch {arch} --data fineweb --mesh 1x1 --dtype float32 --model-tag ours"
        run("scripts.base_train", *common.split(), "--eval-every=-1", "--data-shards=1", *flags)
        seconds = time.perf_counter() - start
        log = (Path(base) / "base_checkpoints/ours/metrics.jsonl").read_text()
    rows = map(json.loads, log.splitlines())
    ours = [row["val_bpb"] for row in rows if "val_bpb" in row][-1]
    return {
        "steps": meta["step"],
        "reference_bpb": meta["val_bpb"],
        "ours_bpb": ours,
        "difference": ours - meta["val_bpb"],
        "tolerance": TOLERANCE,
        "seconds": seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "archs", nargs="*", metavar="ARCH", help=f"{' or '.join(ARCHS)}; default both"
    )
    parser.add_argument(
        "--precision", nargs="+", default=[], choices=("fp8", "int8"), help="also train with these"
    )
    options = parser.parse_args()
    archs = options.archs or ARCHS
    if unknown := set(archs) - set(ARCHS):
        parser.error(f"no architecture {', '.join(sorted(unknown))}: expected {' or '.join(ARCHS)}")
    if not os.environ.get("NANOCHAT_TEST_DATA"):
        print(
            "error: NANOCHAT_TEST_DATA is not set: it names the folder with upstream's runs",
            file=sys.stderr,
        )
        return 2
    data = Path(os.environ["NANOCHAT_TEST_DATA"])
    results = {}
    for arch in archs:
        for precision in ("float32", *options.precision):
            row = train(
                arch, precision, data / "golden" / f"trained-{arch}", data / "data" / "base_data"
            )
            if precision != "float32":
                row["reference_bpb"] = results[f"{arch} float32"]["ours_bpb"]
                row["difference"] = row["ours_bpb"] - row["reference_bpb"]
                row["tolerance"] = PRECISION_TOLERANCE
            results[f"{arch} {precision}"] = row
    print(
        f"\n{'run':15}  {'steps':>5}  {'reference':>9}  {'ours':>8}  {'difference':>10}  "
        f"{'seconds':>7}"
    )
    for name, row in results.items():
        print(
            f"{name:15}  {row['steps']:5}  {row['reference_bpb']:9.4f}  {row['ours_bpb']:8.4f}  "
            f"{row['difference']:+10.4f}  {row['seconds']:7.0f}"
        )
    print(json.dumps(results))
    return int(any(abs(row["difference"]) > row["tolerance"] for row in results.values()))


if __name__ == "__main__":
    sys.exit(main())
