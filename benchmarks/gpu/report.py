"""Results as Markdown tables; left out: charts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
#: Title of a column, and what stands in it.
Column = tuple[str, Callable[[Row], str]]


def _number(name: str, scale: float = 1.0, form: str = "{:,.0f}") -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = row.get(name)
        return "" if value is None else form.format(value / scale)

    return cell


def _text(name: str) -> Callable[[Row], str]:
    return lambda row: str(row.get(name, ""))


_SECONDS = "{:.3f}"
TABLES: dict[str, tuple[str, list[Column]]] = {
    "decode": (
        "Decoding",
        [
            ("model", _text("model")),
            ("engine", _text("engine")),
            ("batch", _text("batch")),
            ("tokens/s", _number("tokens_per_second")),
            ("tokens/s without the first", _number("decode_tokens_per_second")),
            ("first token, s", _number("prefill_seconds", form=_SECONDS)),
            ("token step, ms", _number("seconds_per_token_step", 1e-3, "{:.2f}")),
            ("share of copy bandwidth", _number("bandwidth_share", form="{:.2f}")),
            ("peak, GB", _number("peak_memory_bytes", 1e9, "{:.1f}")),
        ],
    ),
    "grpo": (
        "One GRPO step",
        [
            ("model", _text("model")),
            ("episodes", _text("episodes")),
            ("step, s", _number("seconds", form=_SECONDS)),
            ("rollout, s", _number("rollout_seconds", form=_SECONDS)),
            ("update, s", _number("update_seconds", form=_SECONDS)),
            ("tokens/s", _number("tokens_per_second")),
            ("share of matrix FLOP/s in the update", _number("flops_share", form="{:.2f}")),
            ("peak, GB", _number("peak_memory_bytes", 1e9, "{:.1f}")),
        ],
    ),
    "agree": (
        "CPU and device, the same tokens",
        [
            ("model", _text("model")),
            ("largest difference of a reward", lambda row: f"{row['largest_difference']['rewards']:.1e}"),
            ("of a log-probability", lambda row: f"{row['largest_difference']['ref_logprob']:.1e}"),
            ("tolerance", _text("tolerance")),
            ("agrees", lambda row: "yes" if row["agrees"] else "**no**"),
        ],
    ),
}


def _cells(row: Row, columns: list[Column]) -> list[str]:
    if "error" not in row:
        return [cell(row) for _, cell in columns]
    known = [cell(row) for title, cell in columns if title in ("model", "engine", "batch", "episodes")]
    return [*known, row["error"], *[""] * (len(columns) - len(known) - 1)]


def markdown(results: dict[str, Any]) -> str:
    """Every part that has rows, under the name of the device; a dry run says that it is one."""
    device = results["device"]
    lines = []
    if results["dry_run"]:
        lines += [
            "**A dry run on tiny models: these figures mean nothing, they show that every path runs.**",
            "",
        ]
    lines.append(f"{device['name']}, torch {device['torch']}, transformers {device['transformers']}.")
    if "copy_bandwidth" in device:
        lines.append(
            f"Copying reaches {device['copy_bandwidth'] / 1e9:,.0f} GB/s, "
            f"a bfloat16 matrix product {device['matmul_flops'] / 1e12:,.2f} TFLOP/s{_nominal(device)}."
        )
    for part, (title, columns) in TABLES.items():
        rows = [row for row in results["rows"] if row["part"] == part]
        if rows:
            lines += ["", f"## {title}", "", "| " + " | ".join(name for name, _ in columns) + " |"]
            lines.append("|" + " --- |" * len(columns))
            lines += ["| " + " | ".join(_cells(row, columns)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _nominal(device: dict[str, Any]) -> str:
    if "nominal_flops" not in device:
        return ""
    return (
        f" (nominal: {device['nominal_bandwidth'] / 1e9:,.0f} GB/s and "
        f"{device['nominal_flops'] / 1e12:,.0f} TFLOP/s; shares here are of what is reached)"
    )
