"""The table for people: of each result the values that matter. The result file has all of them."""

from typing import Any

from benchmarks.gpu.record import describe

LABELS = ("phase", "run", "name", "at")
# Result name -> values in the table. Results that are not here appear only if they are wrong.
SHOWN = {
    "device": ("kind", "jax", "driver"),
    "matmul": (
        "tflops",
        "share_of_peak",
        "layer",
        "matmul",
        "bf16_ms",
        "f8_ms",
        "speedup",
        "cublas_f8",
        "relative_error",
    ),
    "copy": ("gb_per_second", "share_of_peak"),
    "same bits": ("same", "differing"),
    "against the CPU": ("largest_difference", "value"),
    "compile": ("what", "rows", "compile_seconds", "needed_gib", "estimated_gib"),
    "step": ("what", "ms", "tokens_per_second", "mfu", "peak_gib"),
    "token": ("rows", "ms", "tokens_per_second", "bandwidth_share"),
    "quantize": ("layer", "operand", "ms"),
    "trace": ("what", "rows", "busy_ms", "span_ms", "calls"),
    "classic step": ("what", "depth", "rows", "ms", "tokens_per_second"),
    "cudnn": ("value",),
    "command buffers": ("value",),
    "float8 matmul": ("value",),
    "torch": ("value",),
    "end": ("status", "took", "error"),
}


def is_bad(result: dict[str, Any]) -> bool:
    """Whether a result is wrong or a run did not end well."""
    return result.get("ok") is False or result.get("status", "ok") != "ok"


def values_of(result: dict[str, Any]) -> dict[str, Any]:
    """The values of a result that the table shows."""
    names = SHOWN.get(result["name"], ())
    if is_bad(result):
        names = tuple(name for name in result if name not in LABELS)
    return {name: result[name] for name in names if name in result}


def summarize(results: list[dict[str, Any]]) -> int:
    """Print the table; return the number of wrong results and of runs that did not end well."""
    bad = sum(map(is_bad, results))
    print(f"\n   {'phase/run':30} {'result':16} values")
    for result in results:
        values = values_of(result)
        if values:
            label = "/".join(dict.fromkeys((result["phase"], result["run"])))
            mark = "!!" if is_bad(result) else "  "
            print(f"{mark} {label:30} {result['name']:16} {describe(values)}")
        if result["name"] == "trace":
            for name, milliseconds, calls in result["families"][:5]:
                print(f"{'':50} {milliseconds:9.3f} ms {calls:7.1f} calls  {name[:60]}")
    errors = [
        max(result[key] for key in ("out", "d_q", "d_k", "d_v"))
        for result in results
        if result["name"] == "relative error"
    ]
    if errors:
        print(f"   attention: {len(errors)} cases, largest relative error {max(errors):.4f}")
    return bad
