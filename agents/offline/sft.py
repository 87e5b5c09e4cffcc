"""Supervised fine-tuning: teach a causal language model to continue as the data does.

    loss = mean over response tokens of -log p(y_t | x, y_<t)

Prompt tokens carry no loss, the end token does. Records are ``{"prompt", "completion"}``, chat records
``{"messages": [{"role", "content"}, ...]}`` (loss on what the assistant says, in every turn), or ``{"text"}``
(loss on everything: pre-training). Run it::

    from agents.offline.sft import sft

    sft("path-or-hub-id", "demonstrations.jsonl", output="my-sft", epochs=3)

Adapters, schedules, checkpoints and logs are those of every trainer on files: :mod:`agents.offline.options`. Left out:
packing several records into one row, sharding over processes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agents import presets
from agents.offline.callbacks import StepCallback
from agents.offline.demonstration_data import load_demonstrations
from agents.offline.learner import Learner
from agents.offline.options import TrainerOptions
from agents.offline.trainer import Task, digest_of_data, length_batches, optimise, tail_mean
from agents.parallel.processes import current
from reward_models.data.encoding import Encoded, TextEncoder, check_ids
from reward_models.data.lengths import Lengths
from reward_models.loading import LoadOptions
from textrl_env.errors import did_you_mean
from textrl_env.lm.causal_lm import CausalLM

IGNORE = -100


class Example(NamedTuple):
    """One record as token ids; ``labels`` repeats them where they carry loss and is -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


def sft_loss(logits: Tensor, labels: Tensor, num_tokens: int | Tensor | None = None) -> Tensor:
    """Mean of ``-log p`` over labelled tokens; the logits at t predict the token at t + 1.

    Args:
        logits: ``[B, T, V]``.
        labels: ``[B, T]``, -100 where there is no loss. The first column is never predicted.
        num_tokens: Divide the sum by this many tokens instead of by the labelled tokens here: the count of the
            whole batch, when it is worked through in parts. The parts then add up to the batch's loss.

    Returns:
        A scalar; 0 when nothing is labelled.
    """
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"expected logits [B, T, V] and labels [B, T], got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    targets = labels[:, 1:]  # [B, T-1]
    keep = targets != IGNORE
    # Only labelled rows are made float32: with a large vocabulary the rest would be the memory peak.
    total = F.cross_entropy(logits[:, :-1][keep].float(), targets[keep], reduction="sum")
    count = keep.sum() if num_tokens is None else num_tokens
    return total / max(int(count), 1)


def encode_demonstration(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase | TextEncoder) -> Example:
    """Turn one record into token ids and labels, by the rules of :mod:`reward_models.data.encoding`.

    Args:
        record: ``{"messages"}`` (loss on what the assistant wrote), ``{"prompt", "completion"}`` of texts or messages
            (loss on the completion) or ``{"text"}`` (loss on everything). ``tools`` and ``chat_template_kwargs``
            beside them go to the chat template.
        tokenizer: A tokenizer, or an encoder with settings of its own.

    Raises:
        ValueError: For a record of none of the known forms, or messages that cannot be laid out.
    """
    return labelled(encode_record(record, TextEncoder.of(tokenizer)))


def encode_record(record: dict[str, Any], encoder: TextEncoder) -> Encoded:
    """See :func:`encode`."""
    if record.get("messages") is not None:
        return encoder.conversation(record["messages"], record)
    if record.get("prompt") is not None and record.get("completion") is not None:
        return encoder.answer(record["prompt"], record["completion"], row=record)
    if record.get("text") is not None:
        return encoder.text(record["text"])
    hint = " ".join(did_you_mean(k, ("prompt", "completion", "messages", "text")) for k in list(record)[:1])
    raise ValueError(
        "a record needs 'prompt' and 'completion', or 'messages', or 'text'; "
        f"got a record with the keys {sorted(record)}. {hint}"
    )


def labelled(encoded: Encoded) -> Example:
    """Token ids with labels where the assistant wrote them."""
    labels = [i if written else IGNORE for i, written in zip(encoded.ids, encoded.written, strict=True)]
    return Example(list(encoded.ids), labels)


def encode_prompt(
    prompt: str | Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase | TextEncoder
) -> list[int]:
    """Token ids of a prompt on its own, exactly as at generation time; a message list goes by the chat template."""
    return TextEncoder.of(tokenizer).prompt(prompt)


def pad_batch(examples: Sequence[Example], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels``, each int64 ``[B, T]``, padded on the right.

    The mask comes from lengths, never from the pad id, which may equal the end token.
    """
    width = max(len(e.input_ids) for e in examples)
    ids = torch.full((len(examples), width), pad_id)
    labels = torch.full((len(examples), width), IGNORE)
    mask = torch.zeros((len(examples), width), dtype=torch.long)
    for row, example in enumerate(examples):
        n = len(example.input_ids)
        ids[row, :n], mask[row, :n] = torch.tensor(example.input_ids), 1
        labels[row, :n] = torch.tensor(example.labels)
    return ids, mask, labels


def accumulate_sft_gradients(
    model: PreTrainedModel,
    examples: Sequence[Example],
    pad_id: int,
    micro_batch_size: int | None = None,
    num_tokens: int | None = None,
) -> float:
    """Back-propagate the loss of one batch in parts of ``micro_batch_size`` records; returns the loss.

    Every part divides by the token count of the whole batch, so the gradient does not depend on the parts.

    Args:
        model: In the mode and on the device that it is trained in.
        examples: The batch, or this process's share of it.
        pad_id: Fills the rows.
        micro_batch_size: Records per pass; None is all.
        num_tokens: Labelled tokens of the whole batch; None counts those here.
    """
    if num_tokens is None:
        num_tokens = labelled_tokens(examples)
    step = micro_batch_size or max(len(examples), 1)
    loss = 0.0
    for start in range(0, len(examples), step):
        ids, mask, labels = (t.to(model.device) for t in pad_batch(examples[start : start + step], pad_id))
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        part = sft_loss(logits, labels, num_tokens)
        part.backward()
        loss += part.item()
    return loss


def labelled_tokens(examples: Sequence[Example]) -> int:
    """How many tokens carry loss."""
    return sum(label != IGNORE for e in examples for label in e.labels[1:])


@torch.no_grad()
def evaluate_sft(
    model: PreTrainedModel, examples: Sequence[Example], pad_id: int, batch_size: int = 64
) -> dict[str, float]:
    """``loss`` (mean over all labelled tokens), ``perplexity`` and token ``accuracy``; dropout off."""
    was_training = model.training
    model.eval()
    total, right, count = 0.0, 0, 0
    for start in range(0, len(examples), batch_size):
        ids, mask, labels = (
            t.to(model.device) for t in pad_batch(examples[start : start + batch_size], pad_id)
        )
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        total += sft_loss(logits, labels, 1).item()
        keep = labels[:, 1:] != IGNORE
        right += int((logits[:, :-1].argmax(-1) == labels[:, 1:])[keep].sum())
        count += int(keep.sum())
    model.train(was_training)
    loss = total / max(count, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": right / max(count, 1)}


def sft(
    model: str | Path | PreTrainedModel,
    data: str | Path | Iterable[dict[str, Any]],
    output: str | Path | None = None,
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    eval_data: str | Path | Iterable[dict[str, Any]] | None = None,
    epochs: float = 1.0,
    learning_rate: float | None = None,
    batch_size: int = 32,
    micro_batch_size: int | None = None,
    max_length: int | None = None,
    too_long: str = "cut",
    skip_bad_rows: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    allow_control_tokens: bool = False,
    warmup_ratio: float = 0.05,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    dropout: bool = False,
    seed: int = 0,
    device: str | torch.device = "auto",
    logger: Any = None,
    log_interval: int = 10,
    callback: StepCallback | None = None,
    **options: Any,
) -> dict[str, float]:
    """Fine-tune a causal language model on demonstrations (or pre-train it on texts).

    Args:
        model: Folder (of a model, or of a peft adapter, which is merged into its model), hub id, or a live model, which
            is trained in place.
        data: Records in any of the forms of the module's docstring: a list, a dataset of ``datasets``, or a file or
            folder that :mod:`reward_models.data.rows` reads.
        output: Folder for the trained model and its tokenizer, an ordinary Hugging Face folder.
        tokenizer: None takes the one that lies beside the model.
        eval_data: Held-out records, scored at the end, and every ``eval_every`` steps.
        epochs: Passes over the data; may be a fraction.
        learning_rate: Peak of Adam's learning rate; linear warm-up, then ``lr_scheduler_type``, a cosine to zero. None
            is 2e-5, for an adapter 2e-4, for the embedded models 2e-3 (:data:`agents.presets.ON_FILES`).
        batch_size: Records per optimiser step.
        micro_batch_size: Records per forward pass; None is all of the batch. Changes memory, not the result.
        max_length: The most tokens of a record; None is what the model can hold.
        too_long: What becomes of longer records: "cut" takes tokens off the prompt's beginning, "skip" leaves the
            record out, "error" refuses the data; see :mod:`reward_models.data.lengths`.
        skip_bad_rows: Leave rows out that cannot be read, instead of stopping at the first.
        chat_template_kwargs: Variables of the chat template, for example ``{"enable_thinking": False}``.
        allow_control_tokens: Whether text in messages may be control tokens; it stays text otherwise.
        warmup_ratio: Share of the steps spent warming up.
        weight_decay: Decoupled weight decay, on matrices only.
        max_grad_norm: The gradient's norm is clipped here.
        dropout: Whether the model's dropout is active.
        seed: Of data order and dropout.
        device: ``"auto"`` or any torch device.
        logger: A stable-baselines3 ``Logger``; gets ``train/loss``, ``train/learning_rate``, ``train/grad_norm``.
        log_interval: Optimiser steps between logged rows.
        callback: stable-baselines3 callbacks (a timestep is an optimiser step), or a function of the step's number
            and its metrics, which stops the training by returning False.
        **options: See :class:`agents.offline.options.TrainerOptions`: adapters, schedules, evaluation,
            checkpoints, logs, loading.

    Returns:
        ``loss`` (mean over the last tenth of the steps), ``first_loss`` (before the first step), ``steps``, ``tokens``
        that carried loss, ``records`` learned from, ``skipped`` ones, ``cut`` ones, and with ``eval_data``
        ``eval_loss``, ``eval_perplexity``, ``eval_accuracy``.

    Raises:
        ValueError: When no record has a token to learn from, or a record has none of the known forms.
    """
    processes = current()
    settings = TrainerOptions.of("sft()", options)
    learner = Learner(model, tokenizer, device, settings, seed=seed)
    model, tokenizer = learner.model, learner.tokenizer
    rate = learning_rate
    if rate is None:
        rate = presets.on_files("sft", "learning_rate", tokenizer, settings.lora_rank)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    lengths = Lengths.of(max_length, model.config, tokenizer, too_long)
    encoder = TextEncoder(tokenizer, chat_template_kwargs, allow_control_tokens)
    examples = encode_all(data, encoder, lengths, skip_bad_rows)
    check_examples(examples, model)
    learn_ends(learner.plain, encoder, examples)
    held_out: list[Example] = []
    if eval_data is not None:
        held_out = encode_all(eval_data, encoder, Lengths(lengths.limit, too_long), skip_bad_rows)

    def backward(indices: list[int]) -> dict[str, float]:
        batch = [examples[i] for i in indices]
        tokens = labelled_tokens(batch)
        mine = processes.share(batch, [len(e.input_ids) for e in batch])
        loss = accumulate_sft_gradients(model, mine, pad_id, micro_batch_size, tokens)
        return {"loss": sum(processes.gather(loss)), "tokens": float(tokens)}

    trained = optimise(
        learner,
        Task(
            length_batches([len(e.input_ids) for e in examples], batch_size),
            backward,
            (lambda: evaluate_sft(model, held_out, pad_id)) if held_out else None,
            {"data": digest_of_data(ids for e in examples for ids in (e.input_ids, e.labels))},
        ),
        epochs=epochs,
        learning_rate=rate,
        batch_size=batch_size,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        dropout=dropout,
        seed=seed,
        logger=logger,
        log_interval=log_interval,
        callback=callback,
        options=settings,
        output=output,
    )
    history = trained.history
    if output is not None:
        processes.on_main(lambda: learner.save(output))
    return {
        "loss": tail_mean(history, "loss"),
        "first_loss": history[0]["loss"],
        "steps": float(len(history)),
        "tokens": sum(metrics["tokens"] for metrics in history),
        "records": float(len(examples)),
        "skipped": float(lengths.left_out),
        "cut": float(lengths.cut),
    } | {f"eval_{name}": value for name, value in trained.held_out.items()}


def check_examples(examples: Iterable[Example], model: PreTrainedModel) -> None:
    """Raise a ValueError if an example has a token that the model does not have."""
    size = model.get_input_embeddings().weight.shape[0]
    for k, example in enumerate(examples):
        check_ids(example.input_ids, size, f"record {k}")


def learn_ends(model: PreTrainedModel, encoder: TextEncoder, examples: Sequence[Example]) -> None:
    """Have answers end with the chat template's end token, too, if that is what the examples end with.

    A base model's tokenizer may end texts otherwise than its template ends turns (Qwen2.5's ``<|im_end|>``). What is
    saved says both, in ``generation_config.json``, so that the model stops there wherever it is loaded.
    """
    end, config = encoder.turn_end_id, getattr(model, "generation_config", None)
    if end is None or config is None or end == encoder.end_id:
        return
    if not any(end in example.labels for example in examples):
        return
    listed = config.eos_token_id
    listed = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
    config.eos_token_id = list(dict.fromkeys([*(listed or [encoder.end_id]), end]))


def load_model(
    model: str | Path | PreTrainedModel,
    tokenizer: str | Path | PreTrainedTokenizerBase | None,
    device: str | torch.device,
    loading: LoadOptions | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model to read from, on its device, and its tokenizer; either may come as a path or live."""
    options = vars(loading) if loading is not None and isinstance(model, (str, Path)) else {}
    lm = CausalLM.load(model, tokenizer, device=device, **options)
    return lm.model, lm.tokenizer


def tell_about_turns(encoded: Sequence[Encoded]) -> None:
    """Say how many of the assistant's turns are not learned, or not where the generation prompt asks for them."""
    rewritten, apart = sum(one.rewritten for one in encoded), sum(one.apart for one in encoded)
    if rewritten:
        warnings.warn(
            f"{rewritten} turns of the assistant are not learned: in a longer conversation the chat template lays "
            "them out in another way than they are written (Qwen3's drops thoughts). The last turn of each "
            "conversation is learned. To learn them all, give each of them as the last turn of a record",
            stacklevel=3,
        )
    if apart:
        warnings.warn(
            f"{apart} answers are learned behind another beginning than the one that the model gets when it is to "
            "answer: the chat template's generation prompt opens a thought, and these answers have none. Give "
            "answers with their thought (<think>...</think>), or turn thinking off in chat_template_kwargs if the "
            "template can",
            stacklevel=3,
        )


def encode_all(
    data: Any,
    tokenizer: PreTrainedTokenizerBase | TextEncoder,
    lengths: Lengths | int | None = None,
    skip_bad_rows: bool = False,
) -> list[Example]:
    """Every record of ``data`` that has a token to learn from, within the model's length.

    Args:
        data: Any source of :mod:`reward_models.data.rows`.
        tokenizer: The model's.
        lengths: What to do with what is too long, and the count of it; a number is a limit at which to cut.
        skip_bad_rows: Leave bad rows out instead of stopping at the first.

    Raises:
        ValueError: A bad row, or no record that can be learned from.
    """
    lengths = lengths if isinstance(lengths, Lengths) else Lengths(lengths)
    records, bad_rows = load_demonstrations(data, skip_bad_rows)
    encoder = TextEncoder.of(tokenizer)
    encoded = [encode_record(record, encoder) for record in records]
    tell_about_turns(encoded)
    fitted = [fit(labelled(one), lengths) for one in encoded]
    kept = [example for example in fitted if example is not None]
    if not kept:
        raise ValueError(
            f"none of the {len(records)} records can be learned from: {lengths.skipped} are longer than "
            f"max_length={lengths.limit} tokens, {lengths.empty} have no token to learn from"
        )
    lengths.bad_rows += len(bad_rows)
    lengths.warn(len(records))
    return kept


def fit(example: Example, lengths: Lengths) -> Example | None:
    """The example within the model's length, or None if there is nothing to learn in it or it is left out."""
    start = tokens_before_loss(example)
    if start == len(example.labels):
        lengths.empty += 1
        return None
    return cut_example(example, lengths.off_prompt(start, len(example.input_ids)), lengths.limit)


def tokens_before_loss(example: Example) -> int:
    """Tokens before the first that carries loss and can be predicted; all of them if none does."""
    labels = enumerate(example.labels)
    return next((k for k, label in labels if label != IGNORE and k > 0), len(example.labels))


def cut_example(example: Example, off_prompt: int | None, limit: int | None) -> Example | None:
    """An example without its first ``off_prompt`` tokens and what then lies beyond ``limit``; None for None."""
    if off_prompt is None:
        return None
    kept = slice(off_prompt, None if limit is None else off_prompt + limit)
    return Example(example.input_ids[kept], example.labels[kept])
