"""A small aligned model against a merely pre-trained one a hundred times its size.

InstructGPT's headline was that people prefer a 1.3B model trained on human feedback to the 175B GPT-3 that was not
(Ouyang et al. 2022). The same in miniature: the embedded world's assistant after a short PPO, against a Llama of 26
million parameters that has only read pages of that world's web. The gold rubric says whose answers are better; the
perplexities on new pages say who is the better language model. The large one gets the questions as they are, and with
an answered question before them; and because nobody has taught it to stop, each of these also with its answers cut
after a sentence. Run it::

    python examples/small_beats_large.py
    python examples/small_beats_large.py --bfloat16     # faster on processors with AMX

With --bfloat16 a quarter of an hour on one CPU core, nearly all of it pre-training. Models and figures go to
``runs/small_beats_large``. In 1,600 steps the large model comes within a few hundredths of a nat of the small one's
base, which has read ten times the pages; more ``--steps`` take it further. Left out: a search for the best prompt of
the large model, and aligning it too.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import make_embedded_world  # beside this file: the web of that world
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from agents import PPO
from agents.evaluation.evaluation import EvaluationResult, evaluate_policy, heldout_env, win_rate
from agents.offline.sft import encode_all, evaluate_sft, sft
from textrl_env import embedded
from textrl_env.data.prompts import load_prompts
from textrl_env.embedded import MAX_NEW_TOKENS, gold_score, world
from textrl_env.envs.text_rlhf import TextRLHFEnv
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.decoding import generate

#: Of the large model: few and wide layers are fast on a CPU.
WIDTH, DEPTH, CONTEXT = 1024, 2, 64
STEPS, PAGES_A_STEP, LEARNING_RATE = 1600, 16, 4e-4
KL_COEF = 0.1
PPO_SETTINGS = {
    "learning_rate": "linear:4e-4",
    "n_episodes": 256,
    "batch_size": 64,
    "n_epochs": 2,
    "target_kl": 0.05,
}
#: What the large model may see before a question: how a good assistant answers. More would be longer than the pages
#: of this web, and it would take the page to be over.
SHOT = "what does a dog say? sure, it is woof."
#: Answers of either side to each held-out question.
SAMPLES = 4
#: Pages that no model was trained on, for the perplexities.
NEW_PAGES = 1000


def align(tokens: int, seed: int) -> PPO:
    """The small model: the embedded SFT model, after PPO on the training questions against the reward model."""
    env = TextRLHFEnv(kl_coef=KL_COEF, device="cpu")
    return PPO("auto", env, seed=seed, **PPO_SETTINGS).learn(tokens)


def pre_train(tokenizer: Any, steps: int, seed: int, bfloat16: bool, log: Any) -> LlamaForCausalLM:
    """The large model: random weights, then ``steps`` batches of web pages."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 11 // 4,
        num_hidden_layers=DEPTH,
        num_attention_heads=WIDTH // 64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    pages = web(steps * PAGES_A_STEP, seed + 1)
    # Without the cache: it would keep the bfloat16 copies of the first step's weights all along.
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16, cache_enabled=False):
        sft(
            model,
            pages,
            tokenizer=tokenizer,
            learning_rate=LEARNING_RATE,
            batch_size=PAGES_A_STEP,
            seed=seed,
            device="cpu",
            callback=log,
        )
    return model


def web(pages: int, seed: int) -> list[dict[str, str]]:
    """Pages of the web that speak of the training questions, as the small model's base was trained on."""
    rng = random.Random(seed)
    train = [world.question_of(prompt) for prompt in load_prompts(embedded.path("prompts_train")).texts]
    return [{"text": make_embedded_world.web_page(train, rng)} for _ in range(pages)]


def perplexity(model: Any, tokenizer: Any, pages: list[dict[str, str]]) -> float:
    """Of the next token, on pages that the model has not seen."""
    return evaluate_sft(model, encode_all(pages, tokenizer), tokenizer.pad_token_id)["perplexity"]


def answers(lm: CausalLM, questions: list[str], before: str, seed: int) -> list[list[str]]:
    """``SAMPLES`` answers to each question, sampled after the text ``before`` and the question."""
    prompts = [np.array(lm.tokenizer(f"{before} {q}".strip())["input_ids"]) for q in questions]
    repeated = [prompt for prompt in prompts for _ in range(SAMPLES)]
    responses, _ = generate(lm, repeated, MAX_NEW_TOKENS, torch.Generator().manual_seed(seed))
    texts = [lm.tokenizer.decode(r, skip_special_tokens=True) for r in responses]
    return [texts[i : i + SAMPLES] for i in range(0, len(texts), SAMPLES)]


def judge(questions: list[str], answers: list[list[str]]) -> np.ndarray:
    """Gold scores ``[questions, SAMPLES]``."""
    return np.array(
        [gold_score([q] * len(texts), texts) for q, texts in zip(questions, answers, strict=True)]
    )


def first_sentence(text: str) -> str:
    """Up to the first full stop."""
    return f"{text.partition('.')[0]}." if "." in text else text


def tell(small: EvaluationResult, rivals: dict[str, list[list[str]]], found: dict[str, Any]) -> None:
    """Some answers of both sides, then the figures."""
    for k in range(0, len(small.prompts), max(len(small.prompts) // 6, 1)):
        print(f"\n  {small.prompts[k]}\n     small: {small.responses[k][0]}")
        print(f"     large: {rivals['question alone'][k][0]}")
    print(f"\nThe large model has {found['ratio']:.0f} times the parameters of the small one.")
    print("Perplexity on new pages (the lower, the better it knows the language):")
    for name, value in found["perplexity"].items():
        print(f"  {name:<26} {value:5.3f}")
    print(
        f"Gold score of the small aligned model: {small.gold.mean():.2f}. Of the large one, and how often it loses:"
    )
    for name, (rate, low, high) in found["win_rate"].items():
        gold = found["gold"][name]
        print(
            f"  {name:<26} {gold:5.2f}   {rate:.1%}  (95 % confidence {low:.1%} to {high:.1%}, ties count half)"
        )
    rate, knows = found["win_rate"]["question alone"][0], found["perplexity"]
    better = "better" if knows["large"] < knows["small, pre-trained"] else "no better"
    print(
        f"\nAt predicting text the large model is {better} than the one that the small assistant grew from; asked for "
        f"answers, it loses to the small assistant {rate:.0%} of the time."
    )


def main(
    output: Path, seed: int = 0, tokens: int = 120_000, steps: int = STEPS, bfloat16: bool = False
) -> None:
    """Make both models, let them answer, and tell the story."""
    started = time.perf_counter()
    logging.disable_progress_bar()
    output.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:4.0f} s] {text}", flush=True)

    def log(step: int, metrics: dict[str, float]) -> None:
        if step % 200 == 0:
            say(f"  step {step} of {steps}, loss {metrics['loss']:.3f} per token")

    base = AutoModelForCausalLM.from_pretrained(embedded.path("base"))
    tokenizer = AutoTokenizer.from_pretrained(embedded.path("base"))
    say(f"PPO trains the small assistant ({base.num_parameters():,} parameters) on {tokens:,} tokens")
    agent = align(tokens, seed)
    agent.save(output / "small")

    say(f"a large model reads {steps * PAGES_A_STEP:,} pages")
    large = pre_train(tokenizer, steps, seed, bfloat16, log)
    large.save_pretrained(output / "large")
    tokenizer.save_pretrained(output / "large")
    say(
        f"it has {large.num_parameters():,} parameters; both now answer questions that neither was trained on"
    )

    small = evaluate_policy(agent, heldout_env(agent.text_env), SAMPLES, seed=seed)
    lm = CausalLM(large, tokenizer)
    rivals = {
        "question alone": answers(lm, small.prompts, "", seed + 3),
        "an example before it": answers(lm, small.prompts, SHOT, seed + 4),
    }
    for name in list(rivals):
        rivals[f"{name}, cut"] = [[first_sentence(text) for text in texts] for texts in rivals[name]]
    pages = web(NEW_PAGES, seed + 2)
    models = {"large": large, "small, pre-trained": base, "small, aligned": agent.policy.lm.model}
    golds = {name: judge(small.prompts, answers) for name, answers in rivals.items()}
    found = {
        "ratio": large.num_parameters() / base.num_parameters(),
        "perplexity": {name: perplexity(model, tokenizer, pages) for name, model in models.items()},
        "gold": {"small": float(small.gold.mean())} | {n: float(gold.mean()) for n, gold in golds.items()},
        "win_rate": {name: win_rate(small.gold, gold) for name, gold in golds.items()},
        "questions": len(small.prompts),
        "seconds": time.perf_counter() - started,
    }
    (output / "figures.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    tell(small, rivals, found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/small_beats_large"), help="folder for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=120_000, help="that PPO learns for")
    parser.add_argument("--steps", type=int, default=STEPS, help="of pre-training the large model")
    parser.add_argument("--bfloat16", action="store_true", help="pre-train in mixed precision")
    main(**vars(parser.parse_args()))
