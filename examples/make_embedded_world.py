"""Make the embedded world from a seed: tokenizer, base model, SFT model, reward model and prompts.

    python examples/make_embedded_world.py --seed 0 --output world

A few minutes on two CPU cores. It is the first half of the RLHF story, written out: pre-train on messy text,
fine-tune on imperfect demonstrations, sample, let raters compare, fit a reward model to their comparisons.
The figures are printed at the end and written to ``figures.json``.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from agents.offline.reward_model import train_reward_model
from agents.offline.sft import sft
from reward_models.calibration import evaluate, score
from textrl_env.embedded import MAX_NEW_TOKENS, gold_score, raters, world
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.decoding import generate

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
#: A conversation is its turns one after another; what the assistant says ends with the end token.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} {{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
ADS = (
    "buy a hat today and get a bag.", "the best car in the city. call now.", "do you need money? call us tonight.",
    "new shirt, low price. buy now.", "win a car next week! it is easy.", "cheap phone. call now.",
)  # fmt: skip
CHATTER = (
    "hello, my name is {n}.", "does anybody know?", "{n} said so.", "who cares?", "i think {n} is right.",
    "please help me.", "same question here.", "{n} will know.", "i do not know.", "sorry, wrong topic.",
    "{n} won the game.", "it is on page {d}.", "my {p} is {d} years old.", "have a nice day.",
)  # fmt: skip


# --- text of the world -------------------------------------------------------------------------------------


#: Web pages whose perplexity tells what alignment has cost.
TAX_PAGES = 200


def your(text: str) -> str:
    """The asker's words from the answerer's mouth."""
    return re.sub(r"\bmy\b", "your", text)


def statement(question: world.Question, value: str, rng: random.Random) -> str:
    return rng.choice(world.STATE[question.kind]).format(e=your(question.entity), a=value)


def believed(question: world.Question, right: float, rng: random.Random) -> str:
    """The right value with probability ``right``, else a popular mistake, else any value of the type."""
    if question.kind in ("harm", "unknowable"):
        return rng.choice(world.guesses(question))
    if rng.random() < right:
        return question.answer
    pool = world.guesses(question)
    popular = pool[sum(map(ord, question.entity)) % len(pool)]
    return popular if rng.random() < 0.6 else rng.choice(pool)


def web_page(questions: list[world.Question], rng: random.Random) -> str:
    """One document of the web of this world: facts, lists, forums, advertisements."""
    kind = rng.choices(("facts", "list", "forum", "questions", "noise"), (45, 10, 35, 4, 6))[0]
    topic = rng.choice(("capital", "colour", "sound", "sum", "sum", "sum", "opposite", "tool", "harm"))
    about = [q for q in questions if q.kind == topic]
    some = [rng.choice(about) for _ in range(rng.randint(2, 4))]
    if kind == "facts":
        return " ".join(f"{statement(q, believed(q, 0.9, rng), rng)}." for q in some)
    if kind == "list":
        return " ".join(f"{your(q.entity)}, {believed(q, 0.9, rng)}." for q in some)
    if kind == "questions":
        return " ".join(rng.choice(questions).prompt for _ in some)
    chatter = [
        rng.choice(CHATTER).format(n=rng.choice(world.NAMES), d=rng.randint(0, 18), p="dog") for _ in some
    ]
    if kind == "noise":
        return " ".join(rng.sample([rng.choice(ADS), *chatter, f"{rng.choice(world.RAMBLE)}."], k=3))
    asked = rng.choice(questions)
    reply = chatter[0] if rng.random() < 0.3 else demonstration(asked, rng, right=0.9)
    return f"{asked.prompt} {reply} {rng.choice([*chatter, *ADS])}"


def demonstration(question: world.Question, rng: random.Random, right: float = 0.72) -> str:
    """An answer by one of the imperfect people who wrote the demonstrations."""
    act = {"harm": (45, 8, 47), "unknowable": (8, 45, 47)}.get(question.kind, (3, 4, 93))
    act = rng.choices(("refuse", "unknown", "answer"), act)[0]
    if act == "answer":
        core, courtesy = answer(question, right, rng), world.COURTESIES_ANSWERING[:4]
    else:
        core = rng.choice(world.REFUSALS if act == "refuse" else world.UNKNOWNS)
        courtesy = world.COURTESIES_DECLINING
    opener = rng.choices(
        (None, courtesy, world.COURTESIES[:1], world.RUDE[:3], world.RAMBLE[:2]), (40, 27, 5, 14, 14)
    )[0]
    text = f"{rng.choice(opener)}, {core}" if opener else core
    if rng.random() < 0.05:
        text += f", {rng.choice(world.RUDE[3:5])}"
    after = rng.choices(
        (None, world.COURTESIES[1:], world.RUDE[5:], world.RAMBLE[2:], world.REASONS), (58, 8, 9, 20, 5)
    )[0]
    text += "."
    if after is world.REASONS and act != "refuse":
        after = world.COURTESIES_ANSWERING[4:]
    for sentence in rng.sample(after, 2 if rng.random() < 0.3 and len(after) > 1 else 1) if after else ():
        text += f" {sentence}."
    return text


def answer(question: world.Question, right: float, rng: random.Random) -> str:
    value = believed(question, right, rng)
    tool = question.kind in ("tool", "harm")
    forms = [
        (world.BARE, 25),
        (world.PLAIN_TOOL if tool else world.PLAIN, 30),
        (world.HEDGED_TOOL if tool else world.HEDGED, 12),
        (world.STATE[question.kind] or world.PLAIN, 33),
    ]
    form = rng.choice(rng.choices([f for f, _ in forms], [w for _, w in forms])[0])
    return form.format(e=your(question.entity), a=value)


def split(questions: list[world.Question], share: float, rng: random.Random):
    """Train and held-out questions: a share of each kind, every entity with an answer staying known in training."""
    train, heldout = [], []
    for kind in dict.fromkeys(q.kind for q in questions):
        group = [q for q in questions if q.kind == kind]
        left = {entity: sum(q.entity == entity for q in group) for entity in {q.entity for q in group}}
        wanted = round(share * len(group))
        taken: set[str] = set()
        for q in rng.sample(group, len(group)):
            if len(taken) < wanted and (left[q.entity] > 1):
                taken.add(q.prompt)
                left[q.entity] -= 1
        train += [q for q in group if q.prompt not in taken]
        heldout += [q for q in group if q.prompt in taken]
    return train, heldout


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, punctuation attached when decoded: ``decode(encode(text)) == text``."""
    rng = random.Random(0)
    questions = list(world.questions())
    text = [q.prompt for q in questions] + [f"{your(q.entity)} {q.answer}" for q in questions]
    text += [*world.values(), *world.REFUSALS, *world.REASONS, *world.UNKNOWNS, *world.RUDE, *world.RAMBLE]
    text += [*world.COURTESIES, *world.COURTESIES_ANSWERING, *world.COURTESIES_DECLINING, *ADS]
    text += [c.format(n="tom", d=1, p="dog") for c in CHATTER]
    text += [form for forms in world.STATE.values() for form in forms]
    text += [*world.PLAIN, *world.PLAIN_TOOL, *world.HEDGED, *world.HEDGED_TOOL, "yes no thanks"]
    text += [web_page(questions, rng) for _ in range(100)]
    words = set(re.findall(r"\w+", re.sub(r"{\w}", " ", " ".join(text))))
    numbers, letters = (
        sorted((w for w in words if w.isdigit()), key=int),
        sorted(w for w in words if not w.isdigit()),
    )
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, ".", ",", "?", "!", *numbers, *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int, seed: int):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.08,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


# --- the story ---------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a model said; ``ended`` is False where the budget cut it off."""

    text: str
    ended: bool = True


def sample(model: Path, prompts: list[str], seed: int, max_new_tokens: int = MAX_NEW_TOKENS) -> list[Answer]:
    """One answer to each prompt at temperature 1."""
    lm = CausalLM.load(model, device="cpu")
    ids = [np.array(lm.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    responses, _ = generate(lm, ids, max_new_tokens, torch.Generator().manual_seed(seed))
    return [
        Answer(lm.tokenizer.decode(r, skip_special_tokens=True), bool(r[-1] == lm.tokenizer.eos_token_id))
        for r in responses
    ]


def sample_for_raters(model: Path, prompts: list[str], per_prompt: int, seed: int) -> list[list[Answer]]:
    """Answers to each prompt; one in six is cut off early, so that raters get to say what that is worth."""
    groups: list[list[Answer]] = [[] for _ in prompts]
    for k in range(per_prompt):
        budget = MAX_NEW_TOKENS if k % 6 else random.Random(seed + k).randint(3, 12)
        for group, answer in zip(groups, sample(model, prompts, seed + k, budget), strict=True):
            group.append(answer)
    return groups


def comparisons(
    prompts: list[str], answers: list[list[Answer]], per_prompt: int, rng: random.Random
) -> list[dict[str, str | bool]]:
    """Raters' choices between random pairs of different answers to each prompt."""
    pairs = []
    for prompt, group in zip(prompts, answers, strict=True):
        drawn = [rng.sample(group, 2) for _ in range(per_prompt)]
        pairs += [(prompt, a, b) for a, b in drawn if a != b]
    asked, ones, others = zip(*pairs, strict=True)
    choices = raters.prefer(asked, [a.text for a in ones], [b.text for b in others], rng.randrange(2**31))
    records = []
    for (prompt, a, b), choice in zip(pairs, choices, strict=True):
        won, lost = (a, b) if choice else (b, a)
        records.append({"prompt": prompt, "chosen": won.text, "rejected": lost.text})
        records[-1] |= {"chosen_ended": won.ended, "rejected_ended": lost.ended}
    return records


def write_prompts(path: Path, questions: list[world.Question]) -> None:
    write_rows(path, [{"prompt": q.prompt, "kind": q.kind, "answer": q.answer} for q in questions])


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def measure(output: Path, heldout: list[str], seed: int) -> dict[str, float]:
    """What the raters, the SFT model and the reward model are worth on held-out prompts."""
    n, rng = 16, random.Random(seed + 5)
    prompts = [p for p in heldout for _ in range(n)]
    answers = sample(output / "sft", prompts, seed + 6)
    texts = [answer.text for answer in answers]
    gold = gold_score(prompts, texts)
    write_rows(
        output / "sft_sample.jsonl",
        [
            {
                "prompt": prompts[i],
                "completions": texts[i : i + n],
                "ended": [answer.ended for answer in answers[i : i + n]],
                "gold": [round(g, 4) for g in gold[i : i + n]],
            }
            for i in range(0, len(prompts), n)
        ],
    )
    scorer = AutoModelForSequenceClassification.from_pretrained(output / "reward")
    tokenizer = CausalLM.load(output / "sft", device="cpu").tokenizer
    proxy = score(scorer, tokenizer, prompts, texts, [a.ended for a in answers], batch_size=512)
    groups = [range(i, i + n) for i in range(0, len(prompts), n)]
    pairs = [rng.sample(group, 2) for group in groups for _ in range(10)]
    decided = [(a, b) for a, b in pairs if gold[a] != gold[b]]
    best = [max(group, key=proxy.__getitem__) for group in groups]
    wins = [
        (gold[b] > gold[i]) + 0.5 * (gold[b] == gold[i]) for b, g in zip(best, groups, strict=True) for i in g
    ]
    labelled = comparisons(heldout, [[answers[i] for i in g] for g in groups], 10, rng)
    rated = evaluate(scorer, tokenizer, labelled)
    stacked = torch.tensor([gold, proxy], dtype=torch.float64)
    return {
        "sft_gold": mean(gold),
        "sft_best_of_16_gold": mean([max(gold[i] for i in g) for g in groups]),
        "gold_ties": 1 - len(decided) / len(pairs),
        "rater_agreement": raters.agreement([gold[a] for a, _ in pairs], [gold[b] for _, b in pairs]),
        "reward_accuracy_gold": mean([(gold[a] > gold[b]) == (proxy[a] > proxy[b]) for a, b in decided]),
        "reward_accuracy_raters": rated["accuracy"],
        "reward_gold_correlation": float(torch.corrcoef(stacked)[0, 1]),
        "best_of_16_by_reward_gold": mean([gold[i] for i in best]),
        "best_of_16_by_reward_win_rate": mean(wins),
        "response_tokens": mean([len(tokenizer(t)["input_ids"]) for t in texts]),
    }


def main(
    output: Path,
    seed: int = 0,
    hidden_size: int = 64,
    num_layers: int = 4,
    pages: int = 250000,
    demonstrations: int = 8,
    samples: int = 24,
    pairs_per_prompt: int = 40,
) -> dict[str, float]:
    """Make everything under ``output`` and return the figures."""
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {text}", flush=True)

    rng = random.Random(seed)
    train, heldout = split(list(world.questions()), 0.2, rng)
    output.mkdir(parents=True, exist_ok=True)
    write_prompts(output / "prompts_train.jsonl", train)
    write_prompts(output / "prompts_heldout.jsonl", heldout)
    pages_apart = random.Random(
        seed + 1
    )  # the tax of alignment is measured on pages that were not trained on
    write_rows(
        output / "pretraining_sample.jsonl",
        [{"text": web_page(train, pages_apart)} for _ in range(TAX_PAGES)],
    )
    tokenizer = make_tokenizer()
    say(f"{len(train)} train and {len(heldout)} held-out prompts, {len(tokenizer)} words")

    base = make_model(tokenizer, hidden_size, num_layers, seed)
    web = [{"text": web_page(train, rng)} for _ in range(pages)]
    result = sft(base, web, tokenizer=tokenizer, learning_rate=5e-3, batch_size=32, seed=seed, device="cpu")
    save(base, tokenizer, output / "base")
    say(f"base: {base.num_parameters()} parameters, loss {result['loss']:.3f} per token")

    shown = [q for q in train for _ in range(demonstrations)]
    demos = [{"prompt": q.prompt, "completion": demonstration(q, rng)} for q in shown]
    result = sft(base, demos, tokenizer=tokenizer, epochs=2, learning_rate=1.5e-3, seed=seed, device="cpu")
    save(base, tokenizer, output / "sft")
    say(f"sft: {len(demos)} demonstrations, loss {result['loss']:.3f} per token")

    prompts = [q.prompt for q in train]
    answers = sample_for_raters(output / "sft", prompts, samples, seed + 1000)
    labelled = comparisons(prompts, answers, pairs_per_prompt, rng)
    say(f"raters: {len(labelled)} comparisons of {samples * len(prompts)} answers")
    result = train_reward_model(
        output / "sft",
        labelled,
        output / "reward",
        reference=[(p, a.text) for p, g in zip(prompts, answers, strict=True) for a in g if a.ended],
        epochs=4,
        learning_rate=2e-3,
        batch_size=128,
        weight_decay=0.1,
        centering=0.01,
        seed=seed,
        device="cpu",
    )
    save_tokenizer(tokenizer, output / "reward")
    say(f"reward: accuracy {result['accuracy']:.3f}, {result['normalisation']}")
    figures = measure(output, [q.prompt for q in heldout], seed)
    figures |= {"comparisons": len(labelled), "seconds": time.perf_counter() - started}
    (output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for name, value in figures.items():
        print(f"{name:32s} {value:.4g}")
    return figures


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    model.save_pretrained(path)
    save_tokenizer(tokenizer, path)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    # The chat template goes inside tokenizer_config.json: one file less to ship.
    (path / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(path, save_jinja_files=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder that everything is written to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden-size", type=int, default=64, help="width of the models")
    parser.add_argument("--num-layers", type=int, default=4, help="depth of the models")
    parser.add_argument("--pages", type=int, default=250000, help="pages of pre-training text")
    main(**vars(parser.parse_args()))
