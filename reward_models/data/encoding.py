"""Texts and conversations as token ids, by one set of rules for training, rewards, environments and evaluation.

    encoder = TextEncoder(tokenizer)
    encoder.prompt("2+2=")                       # as at generation time
    encoder.answer("2+2=", "4").ids              # prompt, answer, end token
    encoder.conversation(messages).written       # which tokens the assistant wrote

The rules:

- *Starts*: a start token (BOS) that the text has already is not put in front of it again.
- *Ends*: an answer is followed by one end token: its own if its text has one, otherwise the tokenizer's, and in a
  conversation the chat template's. An answer that was cut off is followed by none.
- *Borders*: a prompt is encoded as at generation time, and the answer as what follows it there. A tokenizer that puts
  a space in front of whatever it encodes (Llama 2's) does not get one in between: "2+2=" and "4" are "2+2=4".
- *Control tokens* that a message spells are plain text; those of a text that is given as it is are control tokens.

How a conversation is laid out, and what of it the assistant wrote, is :mod:`reward_models.data.chat`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from reward_models.data.chat import ChatTemplate, joined

#: Columns of a record that its chat template reads.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")


class Encoded(NamedTuple):
    """Token ids, and for each whether it was written by the assistant (and so may carry loss).

    ``rewritten`` counts turns of the assistant that are not learned from because the template rewrites them,
    ``apart`` those that stand behind something else than the generation prompt.
    """

    ids: list[int]
    written: list[bool]
    rewritten: int = 0
    apart: int = 0


class TextEncoder:
    """A tokenizer with the rules of this module.

    Args:
        tokenizer: Of transformers.
        chat_template_kwargs: Variables of the chat template, for example ``{"enable_thinking": False}``.
        allow_control_tokens: Whether text in a message that spells a control token becomes that token.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_control_tokens: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, chat_template_kwargs, allow_control_tokens)

    @classmethod
    def of(cls, tokenizer: Any) -> TextEncoder:
        """An encoder as it is, or one of a tokenizer."""
        return tokenizer if isinstance(tokenizer, TextEncoder) else cls(tokenizer)

    def __deepcopy__(self, memo: dict) -> TextEncoder:
        return self

    # -- whole records ----------------------------------------------------------------------------------

    def prompt(self, prompt: Any, row: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of a prompt, a text or messages, as at generation time.

        Args:
            prompt: A text, or messages; an assistant's turn at their end is to be continued.
            row: The record it is from, for its ``tools`` and ``chat_template_kwargs``.
        """
        return (
            self._opening(prompt) if isinstance(prompt, str) else self._ids(self.template.prompt(prompt, row))
        )

    def prompt_text(self, prompt: Any, row: Mapping[str, Any] | None = None) -> str:
        """The text that :meth:`prompt` encodes."""
        return prompt if isinstance(prompt, str) else self.template.unmask(self.template.prompt(prompt, row))

    def answer(
        self, prompt: Any, completion: Any, ended: bool = True, row: Mapping[str, Any] | None = None
    ) -> Encoded:
        """Prompt and completion; only the completion is written.

        Args:
            prompt: A text or messages.
            completion: A text or messages; a list that starts with anything but the assistant's turn is the whole
                conversation.
            ended: False for a completion that was cut off, which gets no end token.
            row: See :meth:`prompt`.
        """
        if isinstance(prompt, str) and isinstance(completion, str):
            before = self._opening(prompt)
            body, end = self._without_end(completion)
            after = self._continuation(prompt, before, body)
            if ended:
                after = [*after, self.end_id if end is None else end]
            return Encoded([*before, *after], [False] * len(before) + [True] * len(after))
        messages, first = joined(prompt, completion)
        return self.conversation(messages, row, first, ended)

    def conversation(
        self, messages: Any, row: Mapping[str, Any] | None = None, first: int = 0, ended: bool = True
    ) -> Encoded:
        """A conversation and what the assistant wrote of it; see :meth:`ChatTemplate.conversation`."""
        found = self.template.conversation(messages, row, first, ended)
        ids: list[int] = []
        written: list[bool] = []
        position = 0
        for start, stop in [*found.written, (len(found.text), len(found.text))]:
            for border, is_written in ((start, False), (stop, True)):
                if border > position:
                    new = self._extension(ids, found.text[:position], found.text[position:border])
                    ids += new
                    written += [is_written] * len(new)
                    position = border
        if found.add_end:
            ids, written = [*ids, self.end_id], [*written, True]
        return Encoded(ids, written, found.rewritten, found.apart)

    def text(self, text: str) -> Encoded:
        """A text to learn as a whole, and one end token."""
        body, end = self._without_end(text)
        ids = [*self._opening(body), self.end_id if end is None else end]
        return Encoded(ids, [True] * len(ids))

    def whole(
        self, prompt: Any, completion: Any, ended: bool = True, row: Mapping[str, Any] | None = None
    ) -> list[int]:
        """What a reward model reads: texts one behind the other, messages as its own template lays all of them out."""
        if isinstance(prompt, str) and isinstance(completion, str):
            return self.answer(prompt, completion, ended).ids
        messages, first = joined(prompt, completion)
        if not ended:
            return self.conversation(messages, row, first, ended).ids
        return self._ids(self.template.render(messages, row))

    # -- texts of others that come between ----------------------------------------------------------------

    def opening(self, text: str) -> list[int]:
        """Ids of a text of somebody else's to begin with; control tokens that it spells stay plain text."""
        masked = self.template.mask(text)
        if not self.template.is_masked(masked):
            return self._opening(text)
        starts = self._added[0] and not text.startswith(self.tokenizer.bos_token)
        return [*([self.tokenizer.bos_token_id] if starts else []), *self._ids(masked)]

    def insertion(self, text: str) -> list[int]:
        """Ids of a text of somebody else's that follows what is there; nothing is put in front of it.

        Control tokens that it spells stay plain text.
        """
        masked = self.template.mask(text)
        return self._without_space(self._ids, masked) if self._adds_space and masked else self._ids(masked)

    def after_turn(
        self, messages: Any, answer: Any, row: Mapping[str, Any] | None = None, ended: int | None = None
    ) -> list[int]:
        """Ids that come between two turns of the assistant: the end of the first, other messages, the next header.

        Args:
            messages: What the first of the two turns answers.
            answer: Messages that answer it.
            row: See :meth:`prompt`.
            ended: The end token that the assistant has written itself, which is not put there again.
        """
        text = self.template.after_turn(messages, answer, row)
        end, rest = self.template.turn_end, text.lstrip()
        if end is None or not rest.startswith(end):
            return self._without_space(self._ids, text) if self._adds_space else self._ids(text)
        after = self._extension([self.turn_end_id], end, rest.removeprefix(end))
        return after if ended is not None and ended == self.turn_end_id else [self.turn_end_id, *after]

    # -- ends -------------------------------------------------------------------------------------------

    @property
    def end_id(self) -> int:
        """The token that ends a text.

        Raises:
            ValueError: The tokenizer has none.
        """
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer {self.tokenizer.name_or_path!r} has no EOS token, so nothing could end; "
                'set one, for example tokenizer.eos_token = "</s>", and save it beside the model'
            )
        return self.tokenizer.eos_token_id

    @functools.cached_property
    def turn_end_id(self) -> int | None:
        """The token with which the chat template ends a turn of the assistant; None if there is none."""
        end = self.template.turn_end
        return None if end is None else self.tokenizer.convert_tokens_to_ids(end)

    def _without_end(self, text: str) -> tuple[str, int | None]:
        """A text without the end token that is spelled at its end, and the id of that; None if there is none."""
        for end, end_id in (
            (self.tokenizer.eos_token, self.tokenizer.eos_token_id),
            (self.template.turn_end, self.turn_end_id),
        ):
            if end and text.rstrip().endswith(end):
                while text.rstrip().endswith(end):  # one is enough
                    text = text.rstrip().removesuffix(end)
                return text, end_id
        return text, None

    # -- back to text -----------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int], after_text: bool = True) -> str:
        """The text of an answer, without special tokens.

        Args:
            ids: Token ids, the end token left out.
            after_text: Whether the answer goes on from a text. Then a space in front of it is kept where the
                tokenizer writes one there; what a chat template puts in front of an answer is not part of it.
        """
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=True)
        if after_text and self._adds_space:
            anchor = self._plain("a")
            before, both = decode(anchor), decode([*anchor, *ids])
            if both.startswith(before):
                return both[len(before) :]
        return decode(ids)

    # -- how it works -----------------------------------------------------------------------------------

    def _plain(self, text: str, **options: Any) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])

    def _opening(self, text: str) -> list[int]:
        """Ids of a text that something follows: one start token, and no end token of the tokenizer's own."""
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        starts, ends = self._added
        if ends and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        if starts and ids[:2] == [self.tokenizer.bos_token_id] * 2:
            ids = ids[1:]
        return ids

    @functools.cached_property
    def _added(self) -> tuple[bool, bool]:
        """Whether the tokenizer puts a start token in front of a text, and an end token behind it."""
        with_special, plain = list(self.tokenizer("a", verbose=False)["input_ids"]), self._plain("a")
        starts = with_special[:1] == [self.tokenizer.bos_token_id] != plain[:1]
        return starts, with_special[-1:] == [self.tokenizer.eos_token_id] != plain[-1:]

    @functools.cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer puts a space in front of a text that has none."""
        first = self.tokenizer.convert_ids_to_tokens(self._plain("a"))[:1]
        return bool(first) and str(first[0]).startswith(("\u2581", "\u0120"))

    def _continuation(self, text: str, before: list[int], more: str) -> list[int]:
        """Ids of a text that goes on from another one; the two are never merged into one token."""
        if not self._adds_space:
            return self._plain(more)
        both = self._opening(text + more)
        return (
            both[len(before) :] if both[: len(before)] == before else self._without_space(self._plain, more)
        )

    def _extension(self, ids: list[int], text: str, more: str) -> list[int]:
        """Ids of the next part of a laid out conversation, of which ``ids`` are those of ``text``."""
        both = self._ids(text + more)
        if both[: len(ids)] == ids:
            return both[len(ids) :]
        # The tokenizer would merge over the border, which cannot happen where the model writes what follows.
        return self._without_space(self._ids, more) if self._adds_space else self._ids(more)

    @staticmethod
    def _without_space(encode: Callable[[str], list[int]], text: str) -> list[int]:
        """Ids of a text as they are in the middle of a line: encoded behind a line break, which is taken off."""
        line_break, both = encode("\n"), encode("\n" + text)
        return both[len(line_break) :] if both[: len(line_break)] == line_break else encode(text)

    def _ids(self, text: str) -> list[int]:
        """Ids of what the template wrote; masked control tokens are encoded as plain text."""
        if not self.template.is_masked(text):
            return self._plain(text)
        # Encoded piece by piece, which must give what encoding all at once gives where nothing is masked.
        harmless = "".join("x" if self.template.is_masked(c) else c for c in text)
        split = functools.partial(self._plain, split_special_tokens=True)
        for as_text in (split, functools.partial(self._without_space, split)):
            if self._piecewise(harmless, as_text) == self._plain(harmless):
                break
        ids = self._piecewise(text, as_text)
        wanted = self._piecewise(harmless, as_text)
        for token in self.template.spelled(text):
            token_id = self.tokenizer.convert_tokens_to_ids(token)
            if ids.count(token_id) > wanted.count(token_id):
                raise ValueError(
                    f"a message spells the control token {token!r}, and this tokenizer makes it of plain text, too; "
                    "take it out of the message, or pass allow_control_tokens=True"
                )
        return ids

    def _piecewise(self, text: str, as_text: Callable[[str], list[int]]) -> list[int]:
        pieces = self.template.split(text)
        added = {str(token): token for token in self.tokenizer.added_tokens_decoder.values()}
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            if i % 2:
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
                continue
            if i > 0 and getattr(added.get(pieces[i - 1]), "rstrip", False):
                piece = piece.lstrip()
            if i + 1 < len(pieces) and getattr(added.get(pieces[i + 1]), "lstrip", False):
                piece = piece.rstrip()
            if piece:
                piece = self.template.unmask(piece)
                ids += self._plain(piece, split_special_tokens=True) if i == 0 else as_text(piece)
        return ids


def check_ids(ids: Iterable[int], size: int, where: str) -> None:
    """Raise a ValueError if a token id is one that a model of ``size`` tokens does not have."""
    worst = max(ids, default=-1)
    if worst >= size:
        raise ValueError(
            f"{where} has the token id {worst}, but the model has {size} tokens (ids 0 to {size - 1}): its tokenizer "
            "has more tokens than it; call model.resize_token_embeddings(len(tokenizer)), or take the model's own "
            "tokenizer"
        )
