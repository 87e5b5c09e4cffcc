"""Direct preference optimisation and its family: learn from comparisons without a reward model.

    loss = -log sigmoid(beta (log pi/pi_ref(chosen) - log pi/pi_ref(rejected)))

Records are ``{"prompt", "chosen", "rejected"}``, or for KTO ``{"prompt", "completion", "label"}`` (pairs do as well:
a chosen completion is desirable, a rejected one is not). Texts or message lists; a completion that was cut off at its
budget says so with ``chosen_ended`` / ``rejected_ended`` / ``ended`` false and gets no end token. Pairs without a
``prompt`` are read by what both sides begin with. Run it::

    from agents.offline.dpo import dpo

    dpo("my-sft", "preferences.jsonl", output="my-dpo", beta=0.1)

The reference is the model as it was at the start; its log-probabilities are computed once, so only one model is in
memory while training. Dropout is off. Left out: a temperature other than 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agents import presets
from agents.offline.callbacks import StepCallback
from agents.offline.learner import Learner
from agents.offline.options import TrainerOptions
from agents.offline.preference_data import Item, completion_length, load_preferences
from agents.offline.preference_losses import dpo_loss, ipo_loss, kto_kl, kto_loss, simpo_loss
from agents.offline.ratio_losses import RATIO_LOSSES
from agents.offline.sft import IGNORE, Example, check_examples, learn_ends, load_model, pad_batch
from agents.offline.trainer import Task, digest_of_data, length_batches, optimise, tail_mean
from agents.parallel.processes import current
from agents.policies.lora import digest_of_weights
from reward_models.data.encoding import TextEncoder
from reward_models.data.lengths import Lengths
from textrl_env.errors import check_choice

#: Names as in TRL; "sigmoid_norm" is DPO normalised by length, as in Tulu 3.
LOSSES = ("sigmoid", "sigmoid_norm", "ipo", "kto", "simpo", *RATIO_LOSSES)
#: Where 0.1 is not the weight to start with: losses that look at means over tokens.
DEFAULT_BETA = {"sigmoid_norm": 5.0, "simpo": 2.0}


def dpo(
    model: str | Path | PreTrainedModel,
    data: str | Path | Iterable[dict[str, Any]],
    output: str | Path | None = None,
    *,
    loss: str = "sigmoid",
    beta: float | None = None,
    label_smoothing: float = 0.0,
    gamma: float = 0.5,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reference: str | Path | PreTrainedModel | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    eval_data: str | Path | Iterable[dict[str, Any]] | None = None,
    epochs: float = 1.0,
    learning_rate: float | None = None,
    batch_size: int = 32,
    micro_batch_size: int | None = None,
    max_length: int | None = None,
    too_long: str = "cut",
    warmup_ratio: float = 0.1,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    skip_bad_rows: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    allow_control_tokens: bool = False,
    seed: int = 0,
    device: str | torch.device = "auto",
    logger: Any = None,
    log_interval: int = 10,
    callback: StepCallback | None = None,
    **options: Any,
) -> dict[str, float]:
    """Fine-tune a causal language model on preferences.

    Args:
        model: Folder, hub id, or a live model, which is trained in place.
        data: Records, or a file of them; see the module's docstring.
        output: Folder for the trained model and its tokenizer, an ordinary Hugging Face folder.
        loss: "sigmoid" (DPO), "sigmoid_norm" (normalised by length), "ipo", "kto", "simpo" (no reference), or one of
            :mod:`agents.offline.ratio_losses` by TRL's name: "hinge", "robust", "exo_pair", "apo_zero", ...
        beta: Weight of the KL; None is 0.1, for "sigmoid_norm" 5 and for "simpo" 2, as they look at means over tokens.
        label_smoothing: The share of labels taken to be flipped, for "sigmoid", "sigmoid_norm" and "simpo".
        gamma: The margin of "simpo".
        desirable_weight: Of desirable completions, for "kto".
        undesirable_weight: Of the others, for "kto".
        reference: None is the model as it is at the start (of a PEFT model: whatever it says at the start).
        tokenizer: None takes the one that lies beside the model.
        eval_data: Held-out records, scored at the end, and every ``eval_every`` steps.
        epochs: Passes over the data; may be a fraction.
        learning_rate: Peak of Adam's learning rate; linear warm-up, then ``lr_scheduler_type``, a cosine to zero. None
            is 1e-6, for an adapter 1e-5, for the embedded models 3e-4 (:data:`agents.presets.ON_FILES`).
        batch_size: Pairs (or for KTO completions) per optimiser step.
        micro_batch_size: Of these, per forward pass; None is all of the batch. Changes memory, not the result.
        max_length: The most tokens of a sequence; None is what the model can hold.
        too_long: What becomes of longer records: "cut" takes tokens off the prompt's beginning (of both sequences
            alike), "skip" leaves the record out, "error" refuses the data; see :mod:`reward_models.data.lengths`.
        warmup_ratio: Share of the steps spent warming up.
        weight_decay: Decoupled weight decay, on matrices only.
        max_grad_norm: The gradient's norm is clipped here.
        skip_bad_rows: Leave rows out that cannot be read, instead of stopping at the first.
        chat_template_kwargs: Variables of the chat template, for example ``{"enable_thinking": False}``.
        allow_control_tokens: Whether text in messages may be control tokens; it stays text otherwise.
        seed: Of data order, and of which completions KTO's baseline puts to which prompts.
        device: ``"auto"`` or any torch device.
        logger: A stable-baselines3 ``Logger``; gets ``train/loss``, ``rewards/chosen``, ``rewards/rejected``,
            ``rewards/margins``, ``rewards/accuracies``, ``logps/chosen``, ``logps/rejected`` and for KTO ``kl``.
        log_interval: Optimiser steps between logged rows.
        callback: stable-baselines3 callbacks (a timestep is an optimiser step), or a function of the step's number
            and its metrics, which stops the training by returning False.
        **options: See :class:`agents.offline.options.TrainerOptions`: adapters, schedules, checkpoints, logs, loading.

    Returns:
        ``loss``, ``margin`` and (of pairs) ``accuracy`` over the last tenth of the steps, ``steps``, ``records``
        learned from, ``skipped`` ones, ``cut`` ones, and with
        ``eval_data`` ``eval_loss``, ``eval_margin`` and ``eval_accuracy``.

    Raises:
        ValueError: An unknown loss, a bad row (its place is named), or nothing to learn from.
    """
    check_choice("loss", loss, LOSSES)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    beta = DEFAULT_BETA.get(loss, 0.1) if beta is None else beta
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    settings = TrainerOptions.of("dpo()", options)
    learner = Learner(model, tokenizer, device, settings, seed=seed)
    model, tokenizer = learner.model, learner.tokenizer
    rate = learning_rate
    if rate is None:
        rate = presets.on_files("dpo", "learning_rate", tokenizer, settings.lora_rank)
    lengths = Lengths.of(max_length, model.config, tokenizer, too_long)
    reading = {"paired": loss != "kto", "skip_bad_rows": skip_bad_rows, "seed": seed}
    encoder = TextEncoder(tokenizer, chat_template_kwargs, allow_control_tokens)
    items, skipped = load_preferences(data, encoder, lengths=lengths, **reading)
    eval_items: list[Item] = []
    if eval_data is not None:
        eval_lengths = Lengths(lengths.limit, too_long)
        eval_items, _ = load_preferences(eval_data, encoder, lengths=eval_lengths, **reading)
    examples = [side for item in [*items, *eval_items] for side in (item.first, item.second)]
    check_examples(examples, model)
    learn_ends(learner.plain, encoder, examples)
    teacher = model
    if reference is not None:
        teacher = load_model(reference, tokenizer, device, settings.loading)[0]
    objective = Objective(
        loss, beta, label_smoothing, gamma, desirable_weight, undesirable_weight, _pad_id(tokenizer)
    )
    processes = current()
    everything = [*items, *eval_items]
    with learner.precision():
        part = objective.reference(teacher, everything[processes.rows(len(everything))])
    known = torch.cat(processes.gather(part.cpu())).to(part.device)  # [N + M, 2]
    judged_by = {} if loss == "simpo" else {"reference": digest_of_weights(teacher.state_dict())[:12]}
    del teacher

    def backward(indices: list[int]) -> dict[str, float]:
        rows = torch.tensor(indices, device=known.device)
        return objective.backward(model, [items[i] for i in indices], known[rows], micro_batch_size)

    def evaluate() -> dict[str, float]:
        return objective.evaluate(model, eval_items, known[len(items) :], micro_batch_size or batch_size)

    learned = [side for item in items for side in (item.first, item.second)]
    trained = optimise(
        learner,
        Task(
            length_batches(
                [max(len(item.first.input_ids), len(item.second.input_ids)) for item in items], batch_size
            ),
            backward,
            evaluate if eval_items else None,
            {
                "loss": loss,
                "beta": beta,
                "data": digest_of_data(ids for e in learned for ids in (e.input_ids, e.labels)),
                **judged_by,
            },
        ),
        epochs=epochs,
        learning_rate=rate,
        batch_size=batch_size,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        dropout=False,
        seed=seed,
        logger=logger,
        log_interval=log_interval,
        callback=callback,
        options=settings,
        output=output,
    )
    if output is not None:
        processes.on_main(lambda: learner.save(output))
    history = trained.history
    result = _summary({name: tail_mean(history, name) for name in _SUMMARY})
    result |= {"first_loss": history[0]["loss"], "steps": float(len(history)), "records": float(len(items))}
    result |= {"skipped": float(skipped), "cut": float(lengths.cut)}
    return result | {f"eval_{name}": value for name, value in _summary(trained.held_out).items()}


#: What is returned, of what is logged.
_SUMMARY = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}


class Objective(NamedTuple):
    """One of the losses with its settings, over batches of items and the reference's log-probabilities of them."""

    loss: str
    beta: float
    label_smoothing: float
    gamma: float
    desirable_weight: float
    undesirable_weight: float
    pad_id: int

    def reference(self, model: PreTrainedModel, items: Sequence[Item]) -> Tensor:
        """Log-probabilities ``[N, 2]`` of both sequences of each item, without gradient; zeros for SimPO."""
        if self.loss == "simpo":
            return torch.zeros(len(items), 2, device=model.device)
        sequences = [sequence for item in items for sequence in (item.first, item.second)]
        return cached_log_probs(model, sequences, self.pad_id).view(-1, 2)

    def backward(
        self, model: PreTrainedModel, batch: Sequence[Item], known: Tensor, micro_batch_size: int | None
    ) -> dict[str, float]:
        """Back-propagate a batch's mean loss in parts; the gradient does not depend on the parts."""
        lengths = [len(item.first.input_ids) + len(item.second.input_ids) for item in batch]
        mine = current().share(range(len(batch)), lengths)
        return self._work(model, batch, known, micro_batch_size or len(batch), mine)

    @torch.no_grad()
    def evaluate(
        self, model: PreTrainedModel, items: Sequence[Item], known: Tensor, batch_size: int
    ) -> dict[str, float]:
        """The metrics of all items together."""
        return self._work(model, items, known, batch_size)

    def _work(
        self,
        model: PreTrainedModel,
        batch: Sequence[Item],
        known: Tensor,
        size: int,
        mine: Sequence[int] | None = None,
    ) -> dict[str, float]:
        """The metrics of a batch; with ``mine`` also the gradient of those rows, and the metrics of all processes."""
        learn, rows = mine is not None, range(len(batch)) if mine is None else mine
        kl = self._baseline(model, batch, known, size, rows, learn)
        loss, sides = 0.0, 1 if self.loss == "kto" else 2
        found = torch.zeros(2, len(batch), sides, device=known.device)  # log-probabilities and rewards
        for start in range(0, len(rows), size):
            at = list(rows[start : start + size])
            part, ref = [batch[row] for row in at], known[at]
            log_probs, lengths = self._log_probs(model, part)  # [b, 2], or [b, 1] for KTO
            losses = self._losses(part, log_probs, lengths, ref, kl)  # [b]
            mean = losses.sum() / len(batch)
            if learn:
                mean.backward()
            loss += mean.item()
            found[0, at] = log_probs.detach().to(found.dtype)
            found[1, at] = self._rewards(log_probs.detach(), lengths, ref).to(found.dtype)
        if learn:
            loss = sum(current().gather(loss))
            found = current().sum(found)  # each row is zero but where it was worked on
        metrics = {"loss": loss} | _metrics(batch, found[1], found[0])
        return metrics | {"kl": float(kl)} if self.loss == "kto" else metrics

    def _log_probs(self, model: PreTrainedModel, part: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """Log-probabilities and lengths of what the loss looks at, ``[b, 2]`` (``[b, 1]`` for KTO)."""
        sides = 1 if self.loss == "kto" else 2
        sequences = [sequence for item in part for sequence in item[:sides]]
        lengths = torch.tensor([completion_length(s) for s in sequences], device=model.device)
        return sequence_log_probs(model, sequences, self.pad_id).view(-1, sides), lengths.view(-1, sides)

    def _losses(
        self, part: Sequence[Item], log_probs: Tensor, lengths: Tensor, ref: Tensor, kl: Tensor | float
    ) -> Tensor:
        if self.loss == "kto":
            labels = torch.tensor([item.label for item in part], device=log_probs.device)
            weights = (self.desirable_weight, self.undesirable_weight)
            return kto_loss(log_probs[:, 0], ref[:, 0], labels, kl, self.beta, *weights)
        pair = (log_probs[:, 0], log_probs[:, 1])
        if self.loss == "simpo":
            return simpo_loss(*pair, *lengths.unbind(1), self.beta, self.gamma, self.label_smoothing)
        if self.loss == "ipo":
            return ipo_loss(*pair, *ref.unbind(1), self.beta, *lengths.unbind(1))
        if self.loss in RATIO_LOSSES:
            ratios = (log_probs - ref).unbind(1)
            return RATIO_LOSSES[self.loss](*ratios, self.beta, self.label_smoothing)
        counted = lengths.unbind(1) if self.loss == "sigmoid_norm" else ()
        return dpo_loss(*pair, *ref.unbind(1), self.beta, self.label_smoothing, *counted)

    def _rewards(self, log_probs: Tensor, lengths: Tensor, ref: Tensor) -> Tensor:
        """The implicit rewards ``beta log pi/pi_ref`` (of SimPO: ``beta log pi / |y|``), shaped like ``log_probs``."""
        if self.loss == "simpo":
            return self.beta * log_probs / lengths.clamp(min=1)
        return self.beta * (log_probs - ref[:, : log_probs.shape[1]])

    @torch.no_grad()
    def _baseline(
        self,
        model: PreTrainedModel,
        batch: Sequence[Item],
        known: Tensor,
        size: int,
        rows: Sequence[int],
        shared: bool,
    ) -> Tensor | float:
        """KTO's KL over the whole batch; 0 for the other losses."""
        if self.loss != "kto":
            return 0.0
        mismatched = torch.zeros(len(batch), device=known.device)
        at = list(rows)
        mismatched[at] = cached_log_probs(model, [batch[row].second for row in at], self.pad_id, size)
        return kto_kl(current().sum(mismatched) if shared else mismatched, known[:, 1])


def sequence_log_probs(model: PreTrainedModel, examples: Sequence[Example], pad_id: int) -> Tensor:
    """``log p(completion | prompt)`` of each example, summed over its labelled tokens: float32 ``[B]``."""
    ids, mask, labels = (t.to(model.device) for t in pad_batch(examples, pad_id))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # [B, T, V]
    targets = labels[:, 1:]  # the logits at t predict the token at t + 1
    keep = targets != IGNORE
    # Only labelled rows are made float32: with a large vocabulary the rest would be the memory peak.
    picked = -F.cross_entropy(logits[:, :-1][keep].float(), targets[keep], reduction="none")
    rows = keep.nonzero()[:, 0]
    return picked.new_zeros(len(examples)).index_add(0, rows, picked)


@torch.no_grad()
def cached_log_probs(
    model: PreTrainedModel, examples: Sequence[Example], pad_id: int, batch_size: int = 64
) -> Tensor:
    """:func:`sequence_log_probs` of any number of examples, without gradient and with dropout off: ``[N]``."""
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    result = torch.zeros(len(examples), device=model.device)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        result[rows] = sequence_log_probs(model, [examples[i] for i in rows], pad_id)
    return result


# -- metrics ------------------------------------------------------------------------------------------------


def _metrics(batch: Sequence[Item], rewards: Tensor, log_probs: Tensor) -> dict[str, float]:
    """The logged means; what a batch does not have (no undesirable completion) is left out."""
    if rewards.shape[1] == 2:
        sides = {"chosen": (rewards[:, 0], log_probs[:, 0]), "rejected": (rewards[:, 1], log_probs[:, 1])}
    else:
        labels = torch.tensor([item.label for item in batch], device=rewards.device)
        sides = {
            name: (rewards[rows, 0], log_probs[rows, 0])
            for name, rows in (("chosen", labels), ("rejected", ~labels))
            if rows.any()
        }
    means = {f"rewards/{name}": reward.mean().item() for name, (reward, _) in sides.items()}
    means |= {f"logps/{name}": log_prob.mean().item() for name, (_, log_prob) in sides.items()}
    if len(sides) == 2:
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    if rewards.shape[1] == 2:
        means["rewards/accuracies"] = (rewards[:, 0] > rewards[:, 1]).float().mean().item()
    return means


def _summary(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics under their short names; those that do not exist are left out."""
    named = {short: metrics.get(name, math.nan) for name, short in _SUMMARY.items()}
    return {name: value for name, value in named.items() if not math.isnan(value)}


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
