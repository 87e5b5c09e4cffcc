"""Which ways lead through the models of each family, and how right they are: docs/models.md.

    python benchmarks/models.py

Tiny random models of :mod:`tests.families`, the ones that ``tests/test_families.py`` checks. The error is the largest
difference, over ragged batches, between log-probabilities that were evaluated, generated or stepped, and those of the
model's own modules on one unpadded sequence at a time in float32. A minute on one core.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a script, the root is not on the path

from gymnasium import logger  # noqa: E402

from tests.families import FAMILIES, family_lm  # noqa: E402
from tests.tiny import WORDS, random_sequences  # noqa: E402
from textrl_env.lm.attention_masks import AttentionMasks  # noqa: E402
from textrl_env.lm.causal_lm import CausalLM  # noqa: E402
from textrl_env.lm.decoding import generate  # noqa: E402
from textrl_env.lm.sequences import Sequences  # noqa: E402

PAGE = """# Which models, and how fast

Written by `python benchmarks/models.py`; `tests/test_families.py` checks the same models at every run. Any causal
language model that transformers loads works. Log-probabilities are always those of its own modules on one unpadded
sequence at a time: every faster way is tried once against them, in float32, on random tokens of ragged lengths with
windows narrowed to a few tokens, and taken only where it agrees (`textrl_env.lm.self_check`). Where no way is right
(tokens that depend on later ones, logits that differ from call to call) `gym.make` says so and stops.

- **cached**: decoding with a key/value cache per slot. Without one every new token takes a pass over the whole
  sequence: a response of T tokens after a prompt of P costs about T (P + T / 2) token passes instead of P + T.
- **packed**: finished responses are read several in a row, behind a prompt that is read once. Otherwise one response a
  row, padded on the right.
- **fused**: a Llama's parts in fewer and larger operations. Otherwise the model's own modules.
- **prompts held once**: in generation, for all responses of a group.
- **error**: the largest in nats of evaluated and generated log-probabilities, on a tiny random model.

{table}

Each of the four can be switched off: `CausalLM.load(..., disable=["fused"])`, or `TEXTRL_DISABLE=fused,cache` in the
environment (`cache`, `packing`, `fused`, `shared_prompts`). Forward hooks are heard: while somebody listens to a module
that a fast way does not call, that way stands aside. Gradient checkpointing works on fused models, with every prompt
read for each of its responses; elsewhere a warning says that it does nothing. A model whose rotary positions turn with
the length of the whole sequence ("longrope") holds no more than its original length.

Encoder-decoders, and models that need more than token ids, are refused.
"""


def note(name: str, lm: CausalLM) -> str:
    """What is particular."""
    masks = AttentionMasks(lm.model.config)
    config = lm.model.config.get_text_config()
    notes = []
    if masks.limited(2**31):
        kinds = {x.layer_type.removesuffix("_attention") for x in masks.limits.values() if x is not None}
        notes.append({"sliding": "windows", "chunked": "chunks"}[kinds.pop()])
    if lm.ways.cache == "padding only" or "ALiBi" in name or name == "MPT":
        notes.append("ALiBi")
    if getattr(config, "final_logit_softcapping", None):
        notes.append("capped logits")
    if lm.ways.cache is None:
        slow = {"XGLM": "takes no cache in slots", "GPT-Neo": "local layers of its own making"}
        slow["Llama 4, early temperature"] = (
            "scores scaled by the tokens of a pass, from 4 on (else from 8,192 on)"
        )
        notes.append(slow.get(name, "recurrent states"))
    return ", ".join(notes)


@torch.no_grad()
def worst_error(lm: CausalLM) -> float:
    """Nats, over evaluated and generated log-probabilities."""
    prompts = random_sequences([3, 1, 9, 3])
    prompts[3] = prompts[0]
    batch = Sequences.from_responses(prompts, random_sequences([9, 14, 2, 6], seed=1))
    written = generate(lm, prompts, 14, torch.Generator().manual_seed(0))
    errors = []
    for sequences, got in ((batch, lm.log_probs(batch)), (written, written.log_probs[written.policy])):
        plain = []
        for prompt, response in zip(sequences.prompts, sequences.responses, strict=True):
            ids = torch.from_numpy(np.concatenate([prompt, response]))[None]
            logits = lm.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1, : len(WORDS)]
            table = logits.float().log_softmax(-1)
            plain.append(table.gather(-1, torch.from_numpy(response)[:, None])[:, 0].numpy())
        errors.append(np.abs(got - np.concatenate(plain)).max())
    return float(max(errors))


def row(name: str) -> str:
    """One line of the table."""
    lm = family_lm(name)
    ways = lm.ways
    marks = [ways.cache, ways.packing, ways.fused, ways.shared_prompts]
    cells = [name, f"`{FAMILIES[name].model}`", *("yes" if mark else "no" for mark in marks)]
    return "| " + " | ".join([*cells, f"{worst_error(lm):.0e}", note(name, lm)]) + " |"


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logger.min_level = logger.ERROR
    logging.getLogger("transformers").setLevel(logging.ERROR)
    head = ["| family | class | cached | packed | fused | prompts held once | error | note |"]
    head.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    table = "\n".join(head + [row(name) for name in FAMILIES])
    (ROOT / "docs" / "models.md").write_text(PAGE.format(table=table))


if __name__ == "__main__":
    main()
