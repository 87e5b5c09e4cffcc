"""A Hugging Face sequence-classification model as a reward.

    reward = HFRewardModel("path/to/reward_model")
    reward.score(["Is water wet?"], [" Yes."]).total

The score is that of the last real token: sequences are padded on the right and their lengths are carried
along, so it is right when the pad token is the end token, when there is no pad token at all, and whatever
else is in the batch. (The forward pass of transformers looks for the last id that is not the pad id instead,
and so passes over an end token that is also the pad token.)

A conversation is laid out by the reward model's own chat template, once. Of a text the token ids are read as they
are where the environment has named the tokenizer that they come from (:meth:`HFRewardModel.use_ids`) and that has the
same vocabulary; otherwise the text is tokenised here.

Left out on purpose: decoder-only classifiers whose head is not a linear layer called ``score``
(ModernBERT-decoder, CTRL) pool in their own forward pass, with what that does where pad is the end token.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from reward_models.base import Batch, Reward, RewardResult, check_scores
from reward_models.data.chat import answer_of, readable
from reward_models.data.encoding import TEMPLATE_COLUMNS, TextEncoder
from reward_models.data.lengths import context_length
from reward_models.names import did_you_mean

OUTPUTS = ("logit", "log_prob")


class HFRewardModel(Reward):
    """A sequence classifier that scores prompt and completion together.

    Args:
        path_or_model: A folder, a hub id, or a loaded model.
        tokenizer: Its tokenizer; by default the one saved beside the model.
        batch_size: Sequences per forward pass.
        device: A torch device, or "auto": where a loaded model is, otherwise a GPU if there is one.
        max_length: Longer sequences lose their beginning; by default the model's own limit.
        label: With more than one label: which one to score, by index or by name.
        output: With more than one label: its "logit" or its "log_prob".
        template: How the text is put together: a format string of ``{prompt}`` and ``{completion}``, or
            "chat" for the tokenizer's chat template. None takes the chat template for messages, and encodes texts as
            environments do.
        end_token: Whether a decoder's end token is put behind text that is tokenised here, unless a chat
            template writes its own. That is how :mod:`reward_models.bradley_terry` trains.
        dtype: Of the weights, when they are loaded here.
        name: What logs call it; the name of the folder by default.
        chat_template_kwargs: Variables of its chat template.
        allow_control_tokens: Whether text in messages may be control tokens; it stays text otherwise.

    Raises:
        ValueError: The folder holds no trained score head, or a label is needed or unknown.
    """

    row_by_row = True

    def __init__(
        self,
        path_or_model: Any,
        tokenizer: Any = None,
        batch_size: int = 64,
        device: str | torch.device = "auto",
        max_length: int | None = None,
        label: int | str | None = None,
        output: str = "logit",
        template: str | None = None,
        end_token: bool = True,
        dtype: str = "float32",
        name: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_control_tokens: bool = False,
    ) -> None:
        if batch_size < 1 or (max_length is not None and max_length < 1):
            raise ValueError(f"batch_size and max_length must be at least 1, got {batch_size}, {max_length}")
        if output not in OUTPUTS:
            raise ValueError(f"output={output!r} is not known. {did_you_mean(output, OUTPUTS)}")
        is_path = isinstance(path_or_model, str | Path)
        self.model = _load(str(path_or_model), dtype) if is_path else path_or_model
        self.tokenizer = _tokenizer(path_or_model if is_path else self.model.config._name_or_path, tokenizer)
        if device != "auto" or is_path:
            self.model.to(_pick(device))
        self.batch_size = batch_size
        self.max_length = max_length or context_length(self.model.config, self.tokenizer)
        self.label = _label_index(self.model.config, label)
        self.output = output
        self.template = _check_template(template, self.tokenizer)
        self.encoder = TextEncoder(self.tokenizer, chat_template_kwargs, allow_control_tokens)
        self.end_token = end_token
        source = str(path_or_model) if is_path else self.model.config._name_or_path
        self.name = name or Path(source).name or "reward_model"
        self._ids_usable: bool | None = None

    def same_vocabulary(self, tokenizer: Any) -> bool:
        """Whether every token of ``tokenizer`` has the same id here, and the other way round."""
        return len(tokenizer) == len(self.tokenizer) and tokenizer.get_vocab() == self.tokenizer.get_vocab()

    def use_ids(self, tokenizer: Any) -> bool:
        """Tell the reward which tokenizer the token ids come from.

        Args:
            tokenizer: The tokenizer of the environment.

        Returns:
            Whether ids will be read as they are. That takes the same vocabulary, a model that reads its
            last token, and no template. A reward that several environments share reads ids only while all
            of their tokenizers fit; it scores text otherwise.
        """
        fits = self.template is None and _reads_last_token(self.model) and self.same_vocabulary(tokenizer)
        if self._ids_usable is not None and self._ids_usable != fits:
            warnings.warn(
                f"reward {self.name!r} is shared by environments of different vocabularies, so from now on "
                "it scores text and no token ids; load it once for each of them to have ids read",
                stacklevel=2,
            )
        self._ids_usable = fits and self._ids_usable is not False
        return self._ids_usable

    def evaluate(self, batch: Batch, optional: bool = False) -> RewardResult:
        sequences = [self._sequence(batch, i) for i in range(len(batch))]
        scores = check_scores(self.score_ids(sequences), batch, self.name)
        return RewardResult(scores, {self.name: scores})

    def score_ids(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """Score whole sequences of token ids.

        Args:
            sequences: ``N`` sequences of this model's token ids, without padding.

        Returns:
            float64 ``[N]``.
        """
        sequences = [self._shorten(sequence) for sequence in sequences]
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        scores = np.empty(len(sequences))
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                scores[chosen] = self._forward([sequences[i] for i in chosen])
        finally:
            self.model.train(was_training)
        return scores

    @torch.no_grad()
    def _forward(self, sequences: list[list[int]]) -> np.ndarray:
        logits = last_token_logits(self.model, sequences, self.tokenizer.pad_token_id or 0).double()
        if self.output == "log_prob":
            logits = logits.log_softmax(-1)
        return logits[:, self.label].cpu().numpy()

    def _sequence(self, batch: Batch, i: int) -> list[int]:
        """The token ids of row ``i``: those that were sampled where they can be read, or of its text or messages."""
        prompt, completion = batch.prompts[i], batch.completions[i]
        is_text = isinstance(prompt, str)
        has_ids = batch.prompt_ids is not None and batch.completion_ids is not None
        if has_ids and self._ids_usable and (is_text or not self.tokenizer.chat_template):
            return [*map(int, batch.prompt_ids[i]), *map(int, batch.completion_ids[i])]
        if self.template == "chat" or (not is_text and self.template is None):
            if not self.tokenizer.chat_template:
                raise ValueError(
                    f"reward {self.name!r} got messages, but its tokenizer has no chat template to lay them out with; "
                    'give it one, or say how: HFRewardModel(..., template="{prompt}{completion}")'
                )
            row = {name: batch.columns[name][i] for name in TEMPLATE_COLUMNS if name in batch.columns}
            turns = [{"role": "user", "content": prompt}] if is_text else prompt
            return self.encoder.whole(turns, completion, row=row)
        return self._encode(prompt if is_text else readable(prompt), answer_of(completion))

    def _encode(self, prompt: str, completion: str) -> list[int]:
        text = (self.template or "{prompt}{completion}").format(prompt=prompt, completion=completion)
        if not _reads_last_token(self.model):
            # Special tokens stand around an encoder's text and have to stay, so the tokenizer shortens it.
            options = {"truncation": True, "max_length": self.max_length}
            return list(self.tokenizer(text, verbose=False, **options)["input_ids"])
        ended = self.end_token and self.tokenizer.eos_token_id is not None
        if self.template is None:
            return self.encoder.answer(prompt, completion, ended).ids
        return self.encoder.text(text).ids if ended else self.encoder.prompt(text)

    def _shorten(self, sequence: Sequence[int]) -> list[int]:
        if len(sequence) == 0:
            raise ValueError(f"reward {self.name!r} cannot score an empty sequence of tokens")
        if self.max_length is None or len(sequence) <= self.max_length:
            return list(sequence)
        warnings.warn(
            f"reward {self.name!r} reads at most {self.max_length} tokens; "
            "longer sequences lose their beginning",
            stacklevel=2,
        )
        return list(sequence[-self.max_length :])


def last_token_logits(model: Any, sequences: Sequence[Sequence[int]], fill: int = 0) -> torch.Tensor:
    """A classifier's logits at the last token of each sequence, in one pass, with gradient.

    Args:
        model: A sequence classifier of transformers.
        sequences: ``B`` sequences of token ids, without padding.
        fill: The id that the padding on the right is made of. It stands behind the attention mask, so for a
            decoder any id of the vocabulary does.

    Returns:
        ``[B, labels]``.
    """
    device = model.device
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)  # [B]
    longest = int(lengths.max())
    rows = [list(sequence) + [fill] * (longest - len(sequence)) for sequence in sequences]
    input_ids = torch.tensor(rows, device=device)  # [B, T]
    mask = (torch.arange(longest, device=device) < lengths[:, None]).long()
    if not _reads_last_token(model):
        return model(input_ids, attention_mask=mask).logits
    hidden = model.base_model(input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(rows), device=device), lengths - 1]  # [B, T, H] -> [B, H]
    return model.score(last)


def _load(path: str, dtype: str) -> Any:
    model, info = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=getattr(torch, dtype), output_loading_info=True, trust_remote_code=False
    )
    if info["missing_keys"]:
        raise ValueError(
            f"{path!r} is no trained reward model: {sorted(info['missing_keys'])} are not in it and would be "
            "random (is it a language model? train a reward model from it first)"
        )
    return model.eval().requires_grad_(False)


def _tokenizer(source: Any, tokenizer: Any) -> Any:
    if tokenizer is None:
        if not str(source):
            raise ValueError("a loaded reward model needs its tokenizer: HFRewardModel(model, tokenizer)")
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    tokenizer = copy.deepcopy(tokenizer)  # the sides set below are ours alone
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    return tokenizer


def _pick(device: str | torch.device) -> str | torch.device:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _label_index(config: Any, label: int | str | None) -> int:
    names = {index: str(config.id2label.get(index, index)) for index in range(config.num_labels)}
    if label is None:
        if config.num_labels == 1:
            return 0
        raise ValueError(
            f"the model has {config.num_labels} labels ({', '.join(names.values())}); name the one that is the "
            f"reward: HFRewardModel(..., label={names[0]!r})"
        )
    for index, name in names.items():
        if label in (index, name):
            return index
    raise ValueError(
        f"label={label!r} is not a label of the model. {did_you_mean(str(label), names.values())}"
    )


def _check_template(template: str | None, tokenizer: Any) -> str | None:
    if template is None:
        return None
    if template == "chat":
        if not tokenizer.chat_template:
            raise ValueError('template="chat", but the tokenizer of the reward model has no chat template')
    elif "{completion}" not in template:
        raise ValueError(
            f'template has to hold "{{completion}}" (and "{{prompt}}") or be "chat", got {template!r}'
        )
    return template


def _reads_last_token(model: Any) -> bool:
    """Whether the score is a linear map of a decoder's last hidden state, which we then apply ourselves."""
    is_linear = isinstance(getattr(model, "score", None), torch.nn.Linear)
    return is_linear and not model.config.is_encoder_decoder
