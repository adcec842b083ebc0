"""What the benchmark runs: phases in order, their time limits, and the sizes of what they
measure.
"""

from dataclasses import dataclass, field

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
NO_TRITON = "--xla_gpu_enable_triton_gemm=false"
NO_COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer="
WHILE_COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer=+WHILE"


@dataclass(frozen=True)
class Run:
    """One child process.

    Attributes:
        name: unique within the phase; the label of its results.
        function: "MODULE:FUNCTION" in this folder, called with (record, size, **arguments).
        arguments: keyword arguments of the function.
        xla_flags: added to XLA_FLAGS, which XLA reads once per process.
    """

    name: str
    function: str
    arguments: dict[str, object] = field(default_factory=dict)
    xla_flags: str = ""


@dataclass(frozen=True)
class Phase:
    name: str
    seconds: float
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Size:
    """Sizes of all measurements."""

    depth: int = 20
    sequence: int = 2048
    vocab: int = 32768
    accumulation: int = 2
    steps: int = 8  # timed training steps per round
    check_depth: int = 4
    check_sequence: int = 512
    attention_lengths: tuple[int, ...] = (32, 100, 2048)
    attention_heads: int = 8
    decode_tokens: int = 32  # tokens per dispatch
    matmul: int = 8192  # side of the square matrices
    copy_bytes: int = 2**30
    float8_width: int = 1536  # of d24
    float8_rows: int = 16 * 2048
    torch_depth: int = 12
    torch_rows: int = 16
    tiny: bool = False


TINY = Size(
    depth=2,
    sequence=256,
    vocab=512,
    steps=2,
    check_depth=1,
    check_sequence=64,
    attention_lengths=(32, 100),
    attention_heads=2,
    decode_tokens=4,
    matmul=256,
    copy_bytes=2**20,
    float8_width=64,
    float8_rows=64,
    torch_depth=1,
    torch_rows=2,
    tiny=True,
)

# Most important first, except that a wrong device or kernel makes the rest worthless. Seconds add
# up to 530 of the 540 that the benchmark may take.
PHASES = (
    Phase("device", 20, (Run("device", "checks:device"),)),
    Phase("attention", 60, (Run("attention", "checks:attention"),)),
    Phase("repeat", 30, (Run("repeat", "checks:repeat"),)),
    Phase(
        "train",
        150,
        (
            Run("rows16", "training:train", {"rows": 16}),
            Run("rows32", "training:train", {"rows": 32}),
        ),
    ),
    Phase(
        "decode",
        90,
        (
            Run("default", "decoding:decode", {"rows": (1, 32, 128)}),
            Run("no-command-buffers", "decoding:decode", {"rows": (32,)}, NO_COMMAND_BUFFERS),
            Run("while-command-buffers", "decoding:decode", {"rows": (32,)}, WHILE_COMMAND_BUFFERS),
        ),
    ),
    Phase("float8", 60, (Run("float8", "float8:matmuls"),)),
    Phase(
        "flags",
        60,
        (
            Run("deterministic", "training:train", {"rows": 16, "repeat": True}, DETERMINISTIC),
            Run("no-triton", "training:train", {"rows": 16}, NO_TRITON),
        ),
    ),
    Phase("torch", 60, (Run("torch", "reference:torch_step"), Run("jax", "reference:jax_step"))),
)
