"""A GRPO step on a game with a tool: ours against TRL's ``environment_factory``, the same class, model and budget.

    python benchmarks/turns_trl.py [--turns 4] [--steps 6]

A random Llama is taught in a minute to call a calculator in every turn but the last, and then to answer. Both sides
train it on the same class (``reset``, a tool, ``get_reward``), 64 episodes in groups of 8, with the same rate and KL
coefficient. Steps alternate in one process, so that a busy machine slows both alike; prints the medians of the
processor time of a step, the first left out, and their ratio. TRL reads the calls by a response template, as it does
for well-known models. The last line is JSON.

Left out: sampling the same tokens on both sides; lengths agree on average, and are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))

EPISODES, GROUP, RATE, KL_COEF = 64, 8, 1e-5, 0.04
#: Tokens of one turn, and of a call with what is put around its answer.
TURN, EXCHANGE = 16, 24
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}"
)
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}
CALL, CALLED = '<tool_call>{"name": "multiply", "arguments": {"a": ', "}}</tool_call>"
PIECES = r'<tool_call>\{"name[^0-9]*| ?"b": |\}\}</tool_call>|, |\d\d|\d| ?[A-Za-z]+|\s|[^\w\s]'


class Products:
    """What both sides play: some products, one call of the tool for each."""

    def reset(self, numbers: list[int], **row: Any) -> None:
        """A row of the data."""
        self.left = [a * b for a, b in pairs_of(numbers)]

    def multiply(self, a: int, b: int) -> int:
        """Multiply two numbers.

        Args:
            a: One number.
            b: The other.
        """
        if a * b in self.left:
            self.left.remove(a * b)
        return a * b

    def get_reward(self) -> float:
        """Whether all products have been worked out."""
        return float(not self.left)


def pairs_of(numbers: list[int]) -> list[tuple[int, int]]:
    """The first two, the next two, and so on."""
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def rows(count: int, calls: int, seed: int) -> list[dict[str, Any]]:
    """Questions as rows, for both sides."""
    rng = random.Random(seed)
    drawn = [[rng.randint(10, 99) for _ in range(2 * calls)] for _ in range(count)]
    return [{"prompt": [{"role": "user", "content": question(n)}], "numbers": n} for n in drawn]


def question(numbers: list[int]) -> str:
    """All the products that are asked for."""
    return "What is " + " and ".join(f"{a} * {b}" for a, b in pairs_of(numbers)) + "?"


def make_model(folder: Path, demonstrations: int, calls: int) -> None:
    """A small Llama that calls the tool so many times, and then answers."""
    from agents.offline.sft import sft

    talks = []
    for row in rows(demonstrations, calls, 1):
        talk = list(row["prompt"])
        for a, b in pairs_of(row["numbers"]):
            talk.append({"role": "assistant", "content": f'{CALL}{a}, "b": {b}{CALLED}'})
            talk.append({"role": "tool", "content": str(a * b)})
        talks.append([*talk, {"role": "assistant", "content": talk[-1]["content"]}])
    splitter = pre_tokenizers.Split(Regex(PIECES), "isolated")
    texts = {message["content"] for talk in talks for message in talk} | {"\nuser", "assistant", "tool", "\n"}
    pieces = {piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)}
    words = ["<|im_start|>", "<|im_end|>", "<unk>", *sorted(pieces | {f"{i:02}" for i in range(100)})]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = splitter, decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|im_start|>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    talks = [{"messages": talk} for talk in talks]
    sft(model, talks, tokenizer=tokenizer, learning_rate=3e-3, batch_size=32, device="cpu")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Ours:
    """Our side: one update at a call."""

    def __init__(self, folder: Path, data: list[dict[str, Any]], turns: int) -> None:
        import gymnasium as gym
        from stable_baselines3.common.callbacks import CallbackList

        import textrl_env  # noqa: F401  registers the ids
        from agents import GRPO

        env = gym.make(
            "TextGame-v0",
            game=Products,
            rows=data,
            num_seeds=1,
            model=str(folder),
            max_turns=turns,
            max_new_tokens=TURN,
            max_length=512,
            kl_coef=KL_COEF,
            device="cpu",
        )
        self.agent = GRPO(
            "auto", env, n_episodes=EPISODES, group_size=GROUP, learning_rate=RATE, kl_in="loss", seed=0
        )
        self.agent.callback = CallbackList([])
        self.agent.callback.init_callback(self.agent)
        self.seconds: list[float] = []
        self.lengths: list[float] = []

    def update(self) -> None:
        """Collect and learn once, timed."""
        started = time.process_time()
        rollout = self.agent.collect()
        self.agent.train(rollout)
        self.agent.iterations += 1
        self.seconds.append(time.process_time() - started)
        self.lengths.append(float(rollout.mask.sum(1).float().mean()))
        self.calls = float((rollout.turn * rollout.mask).max(1).values.float().mean())


def compare(steps: int, folder: Path, turns: int) -> dict[str, Any]:
    """Alternate steps of both sides."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import datasets
    import trl
    from transformers import AutoTokenizer, TrainerCallback

    data = rows(EPISODES // GROUP * (steps + 1), turns - 1, 2)
    ours = Ours(folder, data, turns)
    theirs: list[float] = []
    logged: list[dict[str, float]] = []

    class Alternating(TrainerCallback):
        """Times TRL's step, and makes one of ours after it."""

        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            self.started = time.process_time()

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            theirs.append(time.process_time() - self.started)
            ours.update()

        def on_log(self, *args: object, logs: dict | None = None, **kwargs: object) -> None:
            logged.append(logs or {})

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.response_template = RESPONSE_TEMPLATE
    config = trl.GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=EPISODES,
        num_generations=GROUP,
        max_completion_length=turns * TURN + (turns - 1) * EXCHANGE,
        max_tool_calling_iterations=turns - 1,
        max_steps=steps,
        learning_rate=RATE,
        beta=KL_COEF,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        processing_class=tokenizer,
        args=config,
        train_dataset=datasets.Dataset.from_list(data),
        environment_factory=Products,
        callbacks=[Alternating()],
    )
    trainer.train()
    mine, their = (statistics.median(seconds[1:]) for seconds in (ours.seconds, theirs))
    logs = [row for row in logged if "completions/mean_length" in row]
    return {
        "ours": mine,
        "trl": their,
        "ratio": their / mine,
        "our_tokens": statistics.mean(ours.lengths),
        "our_calls": ours.calls,
        "trl_tokens": statistics.mean(row["completions/mean_length"] for row in logs),
        "trl_calls": statistics.mean(row.get("tools/call_frequency", float("nan")) for row in logs),
        "trl_version": trl.__version__,
        "turns": turns,
        "steps": steps,
    }


def main() -> None:
    """Make the model, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6, help="of each side, the first not counted")
    parser.add_argument("--turns", type=int, default=4, help="of a conversation: calls, and an answer")
    parser.add_argument("--demonstrations", type=int, default=3200)
    parser.add_argument("--folder", type=Path, help="keeps the model; by default it is made anew")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        if not (folder / "config.json").is_file():
            make_model(folder, arguments.demonstrations, arguments.turns - 1)
        found = compare(arguments.steps, folder, arguments.turns)
    print(f"| {found['turns']} | {found['ours']:.2f} s | {found['trl']:.2f} s | {found['ratio']:.1f} |")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
