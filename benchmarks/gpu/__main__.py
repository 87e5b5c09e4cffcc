"""What the project does on a GPU: decoding, the update, a GRPO step, and agreement with the CPU.

    python benchmarks/gpu [--out FOLDER] [--parts decode grpo agree] [--models 0.5B 3B]
    python benchmarks/gpu --dry-run        # tiny models on the CPU: every path, in seconds

Models are Llamas with random weights, made on the spot. Results are written after every row, as JSON and as Markdown,
under the name of the device. What fails, for want of memory or otherwise, is a row and not the end. Left out: several
GPUs.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, the root is not on the path

import torch

from benchmarks.gpu import agreement, decode, machine, update
from benchmarks.gpu.report import markdown
from benchmarks.llama_costs import Shape
from benchmarks.random_llama import make_lm

PARTS = ("decode", "grpo", "agree")
#: Half a billion and several billion parameters, in the proportions of Qwen2.5-0.5B and Llama-3.2-3B.
MODELS = {
    "0.5B": Shape(151_936, 896, 4864, 24, 14, 2, tied=True),
    "3B": Shape(128_256, 3072, 8192, 28, 24, 8, tied=True),
}
TINY = {"tiny": Shape(256, 64, 128, 2, 4, 2), "tiny, tied": Shape(256, 64, 128, 2, 4, 4, tied=True)}


def peaks(device: torch.device, dry_run: bool) -> dict[str, float]:
    """What the device reaches in a copy and in a matrix product."""
    copied, square, repeats = (2**20, 128, 2) if dry_run else (2**30, 8192, 20)
    return {
        "copy_bandwidth": machine.copy_bandwidth(device, copied, repeats),
        "matmul_flops": machine.matmul_flops(device, square, torch.bfloat16, repeats),
    }


def measure(
    device: torch.device,
    about: dict[str, Any],
    models: dict[str, Shape],
    parts: list[str],
    dry_run: bool,
    batches: list[int],
    prompt: int,
    tokens: int,
    episodes: int,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """Every row of every part, the cheap ones first."""
    kind = str(device)
    if "agree" in parts:
        # The large model in float32 on the CPU would take minutes and show nothing new.
        yield from agreement.rows(device, dict(list(models.items())[:1]), prompt)
    for name, shape in models.items():
        # Lambdas are called before the loop goes on.
        if "decode" in parts:
            yield from decode.rows(
                name,
                lambda s=shape: make_lm(s, kind, torch.bfloat16),
                shape,
                batches,
                prompt,
                tokens,
                about["copy_bandwidth"],
                repeats,
            )
        if "grpo" in parts:
            yield from update.rows(
                name,
                lambda s=shape: make_lm(s, kind, torch.bfloat16),
                shape,
                episodes,
                group=4 if dry_run else 8,
                prompt=prompt,
                tokens=tokens,
                micro=4 if dry_run else 8,
                peak=about["matmul_flops"],
                repeats=repeats,
            )


def save(results: dict[str, Any], folder: Path) -> None:
    """Write ``<device>.json`` and ``<device>.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "dry-run" if results["dry_run"] else re.sub(r"[^a-z0-9]+", "-", results["device"]["name"].lower())
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown(results))


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line; what is left open is small in a dry run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder of the results (runs/gpu; a dry run: none)"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="+", default=None, help="1 64 512")
    parser.add_argument("--prompt", type=int, default=None, help="tokens of a prompt (256)")
    parser.add_argument("--tokens", type=int, default=None, help="tokens of a response (256)")
    parser.add_argument("--episodes", type=int, default=None, help="episodes of a GRPO step (64)")
    parser.add_argument("--repeats", type=int, default=None, help="timed calls, of which the median (3)")
    arguments = parser.parse_args(words)
    small, large = ([1, 2], 4, 6, 8, 1), ([1, 64, 512], 256, 256, 64, 3)
    names = ("batches", "prompt", "tokens", "episodes", "repeats")
    for name, value in zip(names, small if arguments.dry_run else large, strict=True):
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.out is None and not arguments.dry_run:
        arguments.out = Path("runs/gpu")
    return arguments


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All results; written as they come where there is a folder."""
    if not arguments.dry_run and not torch.cuda.is_available():
        raise SystemExit(
            "no CUDA device was found, and figures of a CPU would say nothing about one; "
            "--dry-run runs every path with tiny models"
        )
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    about = machine.describe(device) | peaks(device, arguments.dry_run)
    results: dict[str, Any] = {"dry_run": arguments.dry_run, "device": about, "rows": []}
    for row in measure(
        device,
        about,
        TINY if arguments.dry_run else {name: MODELS[name] for name in arguments.models},
        arguments.parts,
        arguments.dry_run,
        arguments.batches,
        arguments.prompt,
        arguments.tokens,
        arguments.episodes,
        arguments.repeats,
    ):
        results["rows"].append(row)
        if not arguments.dry_run:
            print({k: v for k, v in row.items() if not isinstance(v, dict)}, flush=True)
        if arguments.out is not None:
            save(results, arguments.out)
    return results


def failures(results: dict[str, Any]) -> list[str]:
    """What went wrong, memory that ran out left out."""
    wrong = [row for row in results["rows"] if row.get("error", "out of memory") != "out of memory"]
    differ = [row for row in results["rows"] if row.get("agrees") is False]
    return [f"{row['part']}, {row['model']}: {row['error']}: {row['message']}" for row in wrong] + [
        f"{row['part']}, {row['model']}: the CPU and the device differ" for row in differ
    ]


def main() -> None:
    results = run(parse_arguments())
    print(markdown(results))
    if failures(results):
        sys.exit("\n".join(failures(results)))


if __name__ == "__main__":
    main()
