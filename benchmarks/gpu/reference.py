"""The classic d12 model with torch.compile, and with this package, on the same batch."""

import math
from typing import Any

from benchmarks.gpu.plan import Size
from benchmarks.gpu.record import Recorder


def torch_available(record: Recorder) -> bool:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        record("torch", value=f"skipped: {error}")
        return False
    return True


def torch_step(record: Recorder, size: Size) -> None:
    if not torch_available(record):
        return
    import torch

    from benchmarks.gpu.timing import seconds_per_call
    from benchmarks.torch_reference import GPT, Trainer

    cuda, depth, rows = torch.cuda.is_available(), size.torch_depth, size.torch_rows
    device = "cuda" if cuda else "cpu"
    torch.set_float32_matmul_precision("high")
    model = GPT(
        depth=depth,
        num_heads=math.ceil(depth / 2),
        width=64 * depth,
        vocab_size=size.vocab,
        sequence_len=size.sequence,
    )
    dtype = torch.bfloat16 if cuda else torch.float32
    trainer = Trainer(model.to(device), dtype=dtype, compiled=True)
    tokens = torch.randint(size.vocab, (rows, size.sequence + 1), device=device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
    # `step` returns the loss as a number, so each call waits for the device.
    seconds = seconds_per_call(
        lambda: trainer.step(inputs, targets), size.steps, wait=lambda losses: losses
    )
    report(record, "torch.compile", size, seconds, torch=torch.__version__)


def jax_step(record: Recorder, size: Size) -> None:
    """Only beside torch's figure does this one say anything."""
    if not torch_available(record):
        return
    from benchmarks.gpu import program
    from benchmarks.gpu.timing import seconds_per_call

    training = program.classic_training(size.torch_depth, size.torch_rows, size)
    state, batch = training.new_state(), training.batch()
    step, _, compile_seconds = training.compile(state)

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    seconds = seconds_per_call(run, size.steps)
    report(record, "this package", size, seconds, compile_seconds=compile_seconds)


def report(record: Recorder, what: str, size: Size, seconds: float, **more: Any) -> None:
    tokens = size.torch_rows * size.sequence
    record(
        "classic step",
        what=what,
        depth=size.torch_depth,
        rows=size.torch_rows,
        ms=1e3 * seconds,
        tokens_per_second=tokens / seconds,
        **more,
    )
