"""How the texts of a game become tokens: plain, or by the chat template, turn by turn.

What the policy wrote is never decoded and encoded again: a game's answer is encoded once and put behind it. A chat
template sees the opening and, at each turn, a stand-in for the policy's words with the answer after it; what it writes
after the stand-in is the environment's. That is right where the template leaves earlier turns as they were written,
which is measured (:meth:`reward_models.data.chat.ChatTemplate.rewriting`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from reward_models.data.encoding import TextEncoder, check_ids
from reward_models.names import shorten
from reward_models.warning import warn
from textrl_env.errors import check_choice
from textrl_env.games.playing import Observation, as_text

#: Looked for in what a template makes of a message.
_SHOWN = "Answered-7"


class Opening(NamedTuple):
    """The beginning of a game.

    Attributes:
        ids: Token ids, int64.
        text: As people read it.
        messages: What a chat template made the ids of; None where they are those of a text.
        row: What else the template reads, such as tools.
    """

    ids: np.ndarray
    text: str
    messages: list[dict[str, Any]] | None
    row: Mapping[str, Any]


class Turn(str):
    """A turn of the policy as a game gets it: a text, that can be read once more by the tokenizer's own format.

    Attributes:
        tokens: That the policy wrote, int64, the end token among them.
        tokenizer: Of the model.
        chat: Whether a chat template lays out the conversation.
        header: A conversation up to where the assistant begins to write, as the template has it.
    """

    tokens: np.ndarray
    tokenizer: Any
    chat: bool
    header: str

    @classmethod
    def of(cls, text: str, tokens: np.ndarray, tokenizer: Any, chat: bool, header: str) -> Turn:
        """A text with what it was made of."""
        turn = cls(text)
        turn.tokens, turn.tokenizer, turn.chat, turn.header = tokens, tokenizer, chat, header
        return turn

    def parsed(self, tools: list[dict[str, Any]] | None = None) -> dict[str, Any] | None:
        """The turn as a message with ``content`` and ``tool_calls``; None where the tokenizer has no format for it.

        Args:
            tools: Schemas of the tools that can be called.

        Raises:
            ValueError, TypeError: The turn does not keep to the format.
        """
        if not self.chat or getattr(self.tokenizer, "response_template", None) is None:
            return None
        return self.tokenizer.parse_response(self.tokens.tolist(), prefix=self.header, tools=tools)


class Layout:
    """A game's texts as token ids.

    Args:
        encoder: Of the model's tokenizer.
        layout: "chat" (messages, by the chat template), "text" (one text behind the other), or "auto": chat where the
            tokenizer has a template.
        rewriting_template: "error" refuses a template that changes earlier turns, "keep" keeps them as they were
            written.
        num_tokens: Of the model.
        turns: Whether anything will follow a turn of the policy.
        max_answer_tokens: Longer answers are cut; None cuts none.

    Attributes:
        cut: Answers that were cut so far.

    Raises:
        ValueError: The template changes earlier turns.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        layout: str,
        rewriting_template: str,
        num_tokens: int,
        turns: bool,
        max_answer_tokens: int | None = None,
    ) -> None:
        check_choice("layout", layout, ("auto", "chat", "text"))
        check_choice("rewriting_template", rewriting_template, ("error", "keep"))
        self.encoder, self.num_tokens, self.max_answer_tokens = encoder, num_tokens, max_answer_tokens
        has_template = bool(encoder.tokenizer.chat_template)
        if layout == "chat" and not has_template:
            raise ValueError(
                f"layout='chat' needs a chat template, and the tokenizer {encoder.tokenizer.name_or_path!r} has none; "
                "set tokenizer.chat_template, or take layout='text'"
            )
        self.chat = has_template if layout == "auto" else layout == "chat"
        self.cut = 0
        self._shown_roles = {"user"}
        reason = encoder.template.rewriting() if self.chat and turns else None
        if reason is None:
            return
        what = f"the chat template changes what was written in earlier turns: {reason}"
        if rewriting_template == "error":
            raise ValueError(
                f"{what}. The model would be shown another text than it is trained on; take a template that leaves "
                "turns alone, layout='text', or rewriting_template='keep', which keeps earlier turns as they were "
                "written"
            )
        warn(f"{what}; rewriting_template='keep': the model is shown them as they were written")

    def opening(self, observation: Observation, row: Mapping[str, Any]) -> Opening:
        """The ids of a game's opening.

        Raises:
            ValueError: It has no tokens, or some that the model does not have; or there are tools, and the template
                does not show what they answer.
        """
        if self.chat:
            if "tools" in row:
                self._check_role("tool", row)
            messages = _messages(observation)
            ids = self.encoder.prompt(messages, row)
        elif isinstance(observation, str):
            messages, ids = None, self.encoder.opening(observation)
        else:
            raise ValueError(
                f"the game shows messages, {shorten(observation)}, and layout='text' takes texts only; take "
                "layout='chat', or a tokenizer with a chat template"
            )
        if not ids:
            raise ValueError(
                f"the game's opening {shorten(observation)} has no tokens, and nothing could predict the policy's first"
            )
        check_ids(ids, self.num_tokens, "the game's opening")
        return Opening(np.array(ids, dtype=np.int64), as_text(observation), messages, row)

    def answer(self, observation: Observation, opening: Opening, last_token: int) -> np.ndarray:
        """The ids of an answer, int64, with what the template puts around it.

        Args:
            observation: What the game answered.
            opening: Of this episode.
            last_token: With which the policy ended its turn.
        """
        observation = self._shortened(observation)
        if opening.messages is not None:
            messages = _messages(observation)
            for message in messages:
                self._check_role(str(message.get("role")), opening.row)
            ids = self.encoder.after_turn(opening.messages, messages, opening.row, last_token)
        elif isinstance(observation, str):
            ids = self.encoder.insertion(observation)
        else:
            raise ValueError(f"the game began with a text and answers with messages, {shorten(observation)}")
        check_ids(ids, self.num_tokens, "the game's answer")
        return np.array(ids, dtype=np.int64)

    def _check_role(self, role: str, row: Mapping[str, Any]) -> None:
        """Raise a ValueError where the template does not show messages of a role behind a turn of the policy.

        Some refuse them, some want the call of the tool in the turn before as a field of its own (GPT-OSS), and some
        leave them out without a word (Phi-3).
        """
        if role in self._shown_roles:
            return
        asked = [{"role": "user", "content": "?"}]
        try:
            shown = self.encoder.template.after_turn(asked, [{"role": role, "content": _SHOWN}], row)
            problem = None if _SHOWN in shown else "it leaves them out"
        except ValueError as error:
            problem = str(error)
        if problem is not None:
            raise ValueError(
                f"the chat template of {self.encoder.tokenizer.name_or_path!r} does not show the game's messages of "
                f"the role {role!r} behind a turn: {problem}. The model would never see them; take a template that "
                "shows them, or layout='text'"
            )
        self._shown_roles.add(role)

    def text(self, tokens: np.ndarray, ends: bool) -> Turn:
        """The policy's turn as the game gets it, without its end token.

        Args:
            tokens: Of the turn.
            ends: Whether the last one is an end token.
        """
        text = self.encoder.decode(tokens[:-1] if ends else tokens, not self.chat)
        return Turn.of(text, tokens, self.encoder.tokenizer, self.chat, self._header)

    @functools.cached_property
    def _header(self) -> str:
        """What a template writes before the assistant does, which may open a thought."""
        return self.encoder.prompt_text([{"role": "user", "content": "?"}]) if self.chat else ""

    def _shortened(self, observation: Observation) -> Observation:
        """An answer of at most so many tokens; what is cut off is counted, and said the 1st, 2nd, 4th, ... time."""
        if self.max_answer_tokens is None:
            return observation
        if not isinstance(observation, str):
            return [
                message | {"content": self._shortened(content)}
                if isinstance(content := message.get("content"), str)
                else message
                for message in observation
            ]
        ids = self.encoder.insertion(observation)
        if len(ids) <= self.max_answer_tokens:
            return observation
        before, self.cut = self.cut, self.cut + 1
        if self.cut.bit_length() > before.bit_length():
            warn(
                f"{self.cut} answers of games so far had more than max_answer_tokens={self.max_answer_tokens} tokens "
                f"(this one {len(ids)}); their first {self.max_answer_tokens} are shown"
            )
        return self.encoder.decode(ids[: self.max_answer_tokens])


def _messages(observation: Observation) -> list[dict[str, Any]]:
    return [{"role": "user", "content": observation}] if isinstance(observation, str) else observation
