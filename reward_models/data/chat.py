"""Conversations as text: what a chat template makes of messages, and which part of it the assistant wrote.

A template writes headers, control tokens and ends around the messages, and some rewrite earlier turns (Qwen3 drops
their thoughts), trim what was written, or end the last turn otherwise (GPT-OSS). So nothing is taken for granted:

- *What the assistant wrote* is what the template marks with ``{% generation %}``, where it does. Otherwise it is
  measured: a turn is laid out as the last one, with a probe in place of its content, and again with a generation
  prompt in place of the turn. What lies between the generation prompt and the end of the turn was written. A turn that
  the whole conversation lays out in another way was not written as it stands there, and is not learned from.
- *The end of a turn* is the control token that the template puts behind the last turn.
- *Control tokens in messages* stay text: they are masked while the template works, and encoded as plain text by
  :mod:`reward_models.data.encoding`.

Left out: images and other parts that are not text, and conversations as ``from``/``value`` pairs.
"""

from __future__ import annotations

import functools
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from reward_models.names import shorten

#: A conversation: dicts with "role" and "content", and whatever else the template reads.
Messages = Sequence[Mapping[str, Any]]

#: The first of the private code points that stand for a control token which a message spells.
_FIRST_MASK = 0x10F000
_MASKS = re.compile("[\U0010f000-\U0010fffc]")
#: Stands where a content would be. No text holds it: it is a private code point, too.
_PROBE = "\U0010fffd"
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: A thought without words, white space left out.
_NO_THOUGHT = "<think></think>"
_OPEN_TAG = re.compile(r"<([A-Za-z_][\w-]*)>\s*$")
#: Arguments of a tokenizer's ``apply_chat_template`` that no record may set.
_TAKEN = {
    *("messages", "conversation", "tools", "chat_template", "tokenize", "return_dict", "return_tensors"),
    *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    *("padding", "truncation", "max_length"),
}


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
        text: What the template writes; control tokens that were in messages are masked.
        written: Where the assistant's words stand: ``(start, stop)`` in characters, ends of turns included.
        add_end: Whether the template put no end token behind the last turn, so that one has to follow the text.
        rewritten: Turns of the assistant that the template lays out in another way than they were written.
        apart: Written turns that stand behind something else than the generation prompt.
    """

    text: str
    written: list[tuple[int, int]]
    add_end: bool = False
    rewritten: int = 0
    apart: int = 0


class _Turn(NamedTuple):
    """One turn of the assistant, laid out as the last: where in ``text`` it starts, its words end, and it ends."""

    text: str
    start: int
    words_end: int
    end: int
    before: str

    @property
    def has_end(self) -> bool:
        return self.end > self.words_end

    @property
    def is_apart(self) -> bool:
        return self.before != self.text[: self.start] and bool(self.before)


class ChatTemplate:
    """The chat template of a tokenizer, with the settings it is used with.

    Args:
        tokenizer: Of transformers.
        chat_template_kwargs: Variables of the template, for example ``{"enable_thinking": False}``. A record's own
            ``chat_template_kwargs`` go before these.
        allow_control_tokens: Whether text in a message that spells a control token becomes that token.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_control_tokens: bool = False,
    ) -> None:
        problem = problem_in_settings(chat_template_kwargs)
        if problem is not None:
            raise ValueError(f"chat_template_kwargs: {problem}")
        self.tokenizer = tokenizer
        self.kwargs = dict(_parsed(chat_template_kwargs) or {})
        self.allow_control_tokens = allow_control_tokens
        tokens = {str(token) for token in tokenizer.all_special_tokens}
        tokens |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        #: Control tokens, the longest first, so that one that is part of another is not found in its place.
        self.control_tokens = sorted(tokens, key=lambda token: (-len(token), token))
        self._control = _any_of(self.control_tokens)
        unknown = {tokenizer.unk_token}
        self._maskable = _any_of([token for token in self.control_tokens if token not in unknown])
        self._told: set[str] = set()

    # -- text -------------------------------------------------------------------------------------------

    def render(
        self, messages: Messages, row: Mapping[str, Any] | None = None, generation: bool = False
    ) -> str:
        """What the template writes; control tokens that are in messages are masked.

        Args:
            messages: At least one.
            row: The record that the messages are from: its ``tools`` and ``chat_template_kwargs`` are used.
            generation: Whether the text ends where the assistant starts to write.

        Raises:
            ValueError: There is no template, a message cannot be used, or the template refuses the conversation.
        """
        return self._apply(self._tidy(messages), row, add_generation_prompt=generation)

    def prompt(self, messages: Messages, row: Mapping[str, Any] | None = None) -> str:
        """The text up to where the assistant starts to write; an assistant's turn at the end is to be continued."""
        tidy = self._tidy(messages)
        if tidy and tidy[-1]["role"] == "assistant":
            return self._apply(tidy, row, continue_final_message=True)
        return self._apply(tidy, row, add_generation_prompt=True)

    def conversation(
        self,
        messages: Messages,
        row: Mapping[str, Any] | None = None,
        first: int = 0,
        ended: bool = True,
    ) -> Rendered:
        """A whole conversation, and where in it the assistant's words stand.

        Args:
            messages: At least one.
            row: See :meth:`render`.
            first: Turns of the assistant before this message count as given, not as written.
            ended: Whether the last message ended by itself. One that was cut off gets no end.
        """
        tidy = self._tidy(messages)
        last = len(tidy) - 1
        turn = self._turn(tidy, last, row) if tidy[last]["role"] == "assistant" and last >= first else None
        if turn is not None and (not ended or self._continues(tidy[last], turn)):
            return self._behind_prompt(tidy, turn, row, first, ended)
        whole = self._apply(tidy, row) if turn is None else turn.text
        add_end = turn is not None and not turn.has_end
        if add_end and not whole[turn.words_end :].strip():
            whole = whole[: turn.words_end]
        spans = self._marked(tidy, row)
        if spans is not None:
            given = 0 if first == 0 else _common_prefix(self._apply(tidy[:first], row), whole)
            spans = [
                (max(start, given), self._end_of(whole, start, stop)) for start, stop in spans if stop > given
            ]
            return Rendered(whole, spans, add_end, apart=self._count_apart(tidy, row, first, whole))
        spans, rewritten, apart = self._measured(tidy if turn is None else tidy[:last], row, first, whole)
        if turn is not None:
            spans.append((turn.start, turn.end if turn.has_end else len(whole)))
            apart += turn.is_apart
        return Rendered(whole, spans, add_end, rewritten, apart)

    @functools.cached_property
    def turn_end(self) -> str | None:
        """The control token that ends a turn of the assistant, or None if the template writes none."""
        if not self.tokenizer.chat_template:
            return None
        question = {"role": "user", "content": "a"}
        for messages in ([question], [{"role": "system", "content": "a"}, question]):
            try:
                text = self._apply([*messages, {"role": "assistant", "content": _PROBE}], None)
            except Exception:  # a template may refuse anything, in its own words
                continue
            end = self._next_end(text, text.rfind(_PROBE) + 1) if _PROBE in text else None
            return None if end is None else end[-1]
        return None

    def after_turn(self, messages: Messages, answer: Messages, row: Mapping[str, Any] | None = None) -> str:
        """What stands between the assistant's words and where it writes next; control tokens in messages are masked.

        Args:
            messages: What the words answer.
            answer: What follows them; no messages if nothing does.
            row: See :meth:`render`.

        Raises:
            ValueError: The template does not show the words, or refuses the conversation.
        """
        turn = {"role": "assistant", "content": _PROBE}
        # A game may have nothing to say, as a tool that was not called.
        conversation = [*self._tidy(messages), turn, *(self._tidy(answer) if answer else [])]
        _, found, after = self._apply(conversation, row, add_generation_prompt=True).rpartition(_PROBE)
        if not found:
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path!r} does not show what the assistant has said before"
            )
        return after

    def rewriting(self, row: Mapping[str, Any] | None = None) -> str | None:
        """How the template changes earlier turns of the assistant, found out with small conversations.

        White space around a turn does not count, and neither does an empty thought that is shown before a turn without
        one. None if a turn stays as it was written, once others follow.
        """
        ask = [{"role": "user", "content": text} for text in ("one?", "two?", "three?")]
        for words in ("first", "<think>\nhidden\n</think>\n\nfirst"):
            turn = [
                {"role": "assistant", "content": text} for text in (words, words.replace("first", "second"))
            ]
            try:
                prompt = self._apply(ask[:1], row, add_generation_prompt=True)
                once = self._apply([ask[0], turn[0], ask[1]], row, add_generation_prompt=True)
                conversation = [ask[0], turn[0], ask[1], turn[1], ask[2]]
                twice = self._apply(conversation, row, add_generation_prompt=True)
            except ValueError as error:
                return str(error)
            written = prompt + _past_opening(words, _OPEN_TAG.search(prompt))
            shown = _squeezed(once)
            if not shown.startswith(_squeezed(written)):
                shown = shown.replace(_NO_THOUGHT, "", 1)
            if not shown.startswith(_squeezed(written)):
                return f"what was written as {_excerpt(written, once)} becomes {_excerpt(once, written)}"
            end = self.turn_end
            if end and not shown.startswith(_squeezed(written + end)):
                return f"a last turn ends with {end!r}, and an earlier one becomes {_excerpt(once, written + end)}"
            if not _squeezed(twice).startswith(_squeezed(once)):
                return f"what was shown as {_excerpt(once, twice)} becomes {_excerpt(twice, once)}"
        return None

    # -- control tokens in messages ---------------------------------------------------------------------

    def mask(self, text: str) -> str:
        """A text of somebody else's with its control tokens masked, unless they are allowed."""
        return text if self.allow_control_tokens else self._mask(text)

    def is_masked(self, text: str) -> bool:
        """Whether a text of ours holds masks."""
        return _MASKS.search(text) is not None

    def split(self, text: str) -> list[str]:
        """A text in pieces: text, control token of the template, text, ..., text; masks stay in."""
        return self._control_groups.split(text)

    def unmask(self, text: str) -> str:
        """The text as people read it: what was masked is back in its place."""
        return _MASKS.sub(lambda found: self.control_tokens[ord(found[0]) - _FIRST_MASK], text)

    def spelled(self, text: str) -> list[str]:
        """The control tokens that are masked in a text."""
        return [self.control_tokens[ord(mask) - _FIRST_MASK] for mask in dict.fromkeys(_MASKS.findall(text))]

    @functools.cached_property
    def _control_groups(self) -> re.Pattern:
        return re.compile(f"({self._control.pattern})")

    def _mask(self, value: Any) -> Any:
        """The value with every control token in its strings masked, at any depth."""
        if isinstance(value, str):
            value = _MASKS.sub("", value.replace(_PROBE, ""))
            return self._maskable.sub(lambda found: self._mask_of(found[0]), value)
        if isinstance(value, Mapping):
            return {key: self._mask(item) for key, item in value.items()}
        return [self._mask(item) for item in value] if isinstance(value, list | tuple) else value

    def _mask_of(self, token: str) -> str:
        if token not in self._told:
            self._told.add(token)
            warnings.warn(
                f"a message spells the control token {token!r}: it is read as plain text, so that nobody can end a "
                "turn or begin one from inside a message; allow_control_tokens=True makes it a control token",
                stacklevel=2,
            )
        return chr(_FIRST_MASK + self.control_tokens.index(token))

    # -- how it works -----------------------------------------------------------------------------------

    def _tidy(self, messages: Messages) -> list[dict[str, Any]]:
        """Messages as templates read them: contents are texts, ends and control tokens are not in them."""
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer {self.tokenizer.name_or_path!r} has no chat template, so messages cannot be laid out; "
                "set tokenizer.chat_template, or use texts"
            )
        if not messages:
            raise ValueError("a conversation needs at least one message, got an empty list")
        tidy = []
        for i, message in enumerate(messages):
            message = {key: value for key, value in message.items() if value is not None}
            if "role" not in message:
                raise ValueError(f"message {i} has no 'role', only {sorted(message)}")
            if "content" in message:
                message["content"] = text_of(message["content"])
                if message["role"] == "assistant":
                    message["content"] = self._without_end(message["content"])
            tidy.append(message if self.allow_control_tokens else self._mask(message))
        return tidy

    def _without_end(self, content: str) -> str:
        """A content without the end token that exported data carry in it: the template writes its own."""
        for end in (self.tokenizer.eos_token, self.turn_end):
            while end and content.rstrip().endswith(end):
                content = content.rstrip().removesuffix(end)
        return content

    def _apply(self, messages: Sequence[dict], row: Mapping[str, Any] | None, **options: Any) -> str:
        tools, settings = self._settings(row)
        messages = self._as_parts(messages) if self._wants_parts else messages
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, **(settings | options)
            )
        except Exception as error:  # of the template's own, of Jinja, or of what was handed to it
            if not self.tokenizer.chat_template:
                raise
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path!r} refuses a conversation of the roles "
                f"[{roles}] that begins with {shorten(readable(messages[:1]))}: {error}"
            ) from error

    @functools.cached_property
    def _wants_parts(self) -> bool:
        """Whether the template shows contents that are lists of parts, and no plain texts, as those with images do."""
        messages = [{"role": "user", "content": _PROBE}]
        shown = []
        for given in (messages, self._as_parts(messages)):
            try:
                shown.append(
                    _PROBE in self.tokenizer.apply_chat_template(given, tokenize=False, **self.kwargs)
                )
            except Exception:  # a template may refuse anything, in its own words
                shown.append(False)
        return shown == [False, True]

    @staticmethod
    def _as_parts(messages: Sequence[dict]) -> list[dict]:
        return [
            message | {"content": [{"type": "text", "text": message["content"]}]}
            if "content" in message
            else message
            for message in messages
        ]

    def _settings(self, row: Mapping[str, Any] | None) -> tuple[list[Any] | None, dict[str, Any]]:
        """The tools of a record, and the template's variables; either may be JSON in a column of a file."""
        tools, own = (_parsed((row or {}).get(name)) for name in ("tools", "chat_template_kwargs"))
        given = {key: value for key, value in (own or {}).items() if value is not None}
        return (tools if self.allow_control_tokens else self._mask(tools)) or None, self.kwargs | given

    def _turn(self, messages: list[dict], i: int, row: Mapping[str, Any] | None) -> _Turn:
        """Measure turn ``i`` of the assistant, laid out as the last one."""
        text = self._apply(messages[: i + 1], row)
        if messages[i].get("tool_calls"):  # what stands around a call depends on whether there is a content
            probe, words_end = text, len(text.rstrip())
            found = [match for match in self._control.finditer(text) if match.end() == words_end]
            words_end = found[0].start() if found else len(text)
        else:
            probe = self._apply([*messages[:i], messages[i] | {"content": _PROBE}], row)
            words_end = len(text) - _common_suffix(text, probe)
        words_start = _common_prefix(text, probe)
        before, start = "", words_start
        if i > 0:
            before = self._apply(messages[:i], row, add_generation_prompt=True)
            start = min(_common_prefix(before, probe), _common_prefix(before, text))
            start = len(before) if text.startswith(before) else start
            if start < _common_prefix(before, self._apply(messages[:i], row)):
                # The turns before are laid out otherwise once this one is there.
                before, start = "", words_start
        return _Turn(text, start, words_end, self._past_end(text, words_end), before)

    def _past_end(self, text: str, position: int) -> int:
        """Behind the end of a turn that comes next, if nothing but white space stands in between."""
        end = self._next_end(text, position)
        return position if end is None or text[position : end[0]].strip() else end[1]

    def _next_end(self, text: str, position: int) -> tuple[int, int, str] | None:
        """Start, stop and last token of the next end: a control token, or several up to the tokenizer's end token."""
        found = self._control.search(text, position)
        if found is None:
            return None
        run = [found]
        while (more := self._control.match(text, run[-1].end())) is not None:
            run.append(more)
        ends = [match for match in run if match[0] == self.tokenizer.eos_token] or run[:1]
        return found.start(), ends[0].end(), ends[0][0]

    def _marked(self, messages: list[dict], row: Mapping[str, Any] | None) -> list[tuple[int, int]] | None:
        """What the template itself marks as written by the assistant; None if it marks nothing."""
        tools, settings = self._settings(row)
        template = self.tokenizer.get_chat_template(None, tools)
        if not _MARKER.search(template):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        _, spans = render_jinja_template(
            conversations=[self._as_parts(messages) if self._wants_parts else messages],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **(self.tokenizer.special_tokens_map | settings),
        )
        return [tuple(span) for span in spans[0]]

    def _end_of(self, text: str, start: int, stop: int) -> int:
        """Where a marked span ends: with its end token, which some templates leave out or put a line break behind."""
        body = text[start:stop].rstrip()
        if any(body.endswith(token) for token in self.control_tokens):
            return start + len(body)
        past = self._past_end(text, stop)
        return (
            past if text[:past].endswith((self.turn_end or "\0", self.tokenizer.eos_token or "\0")) else stop
        )

    def _measured(
        self, messages: list[dict], row: Mapping[str, Any] | None, first: int, whole: str
    ) -> tuple[list[tuple[int, int]], int, int]:
        """Where the assistant's turns stand in the whole; how many it rewrites, and how many stand apart."""
        spans, rewritten, apart = [], 0, 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i < first:
                continue
            turn = self._turn(messages, i, row)
            is_same = whole[: turn.words_end] == turn.text[: turn.words_end]
            # What has to stand behind the generation prompt word for word is not written as it is laid out.
            if not is_same or self._continues(message, turn):
                rewritten += 1
                continue
            same_end = whole[: turn.end] == turn.text[: turn.end]
            spans.append((turn.start, turn.end if same_end else turn.words_end))
            apart += turn.is_apart
        return spans, rewritten, apart

    def _count_apart(
        self, messages: list[dict], row: Mapping[str, Any] | None, first: int, whole: str
    ) -> int:
        """How many of the assistant's turns the whole has behind something else than their generation prompt."""
        count = 0
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and i >= max(first, 1):
                before = self._apply(messages[:i], row, add_generation_prompt=True)
                # Where the whole lays the turns before out otherwise, nothing can be said.
                shared = _common_prefix(before, self._apply(messages[:i], row))
                count += _common_prefix(before, whole) in range(shared, len(before))
        return count

    # -- answers that go on where the generation prompt stops ---------------------------------------------

    def _continues(self, message: dict, turn: _Turn) -> bool:
        """Whether the answer has to be put behind the generation prompt word for word.

        So it is where the generation prompt opens a thought that the answer goes on with and closes, unless the
        template writes just that; and where the template drops words of the answer (DeepSeek's drops the thought).
        """
        content = message.get("content", "")
        if not turn.before or message.get("tool_calls"):
            return False
        opened = _OPEN_TAG.search(turn.before)
        if opened is not None and f"</{opened[1]}>" in content:
            rest = _squeezed(turn.text[len(turn.before) :])
            is_so = turn.text.startswith(turn.before) and rest.startswith(
                _squeezed(_past_opening(content, opened))
            )
            return not is_so
        return _squeezed(content) not in _squeezed(turn.text)

    def _behind_prompt(
        self, messages: list[dict], turn: _Turn, row: Mapping[str, Any] | None, first: int, ended: bool
    ) -> Rendered:
        """The generation prompt, then what was written, word for word; then the end if it ended."""
        content = messages[-1].get("content", "")
        opened = _OPEN_TAG.search(turn.before)
        begun = re.match(r"\s*<([A-Za-z_][\w-]*)>", content)
        in_thought = opened is not None or (begun is not None and f"</{begun[1]}>" not in content)
        if not turn.before or (not ended and not in_thought and not turn.is_apart):
            text, start = turn.text[: turn.words_end], turn.start  # as the template lays it out, and no end
        else:
            text, start = turn.before + _past_opening(content, opened), len(turn.before)
        end = (turn.text[turn.words_end : turn.end] or self.turn_end or "") if ended else ""
        spans, rewritten, apart = self._measured(messages[:-1], row, first, text)
        text += end
        return Rendered(text, [*spans, (start, len(text))], ended and not end, rewritten, apart)


# -- messages -------------------------------------------------------------------------------------------


def text_of(content: Any) -> str:
    """A content as text: a string, or parts of the form ``{"type": "text", "text": ...}``, one after another."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = []
    for part in content if isinstance(content, list | tuple) else [content]:
        if isinstance(part, str):
            parts.append(part)
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            parts.append(part["text"])
        else:
            came = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"a content has a part of type {came!r}; only text can be used")
    return "".join(parts)


def problem_in(messages: Sequence[Any]) -> str | None:
    """What is wrong with a list of messages, to be put behind its place, or None.

    A message needs a role and a content: a text, or parts that are texts. Without a content it needs something else
    that a template can show, such as ``tool_calls``.
    """
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            return f"message {i}: expected {{'role': ..., 'content': ...}}, got {_described(message)}"
        if not isinstance(message.get("role"), str):
            came = _described(message["role"]) if "role" in message else f"only {sorted(message)}"
            return f"message {i}: expected a text as 'role', got {came}"
        content = message.get("content")
        if content is None:
            if not any(value for key, value in message.items() if key not in ("role", "content")):
                came = _described(None) if "content" in message else f"only {sorted(message)}"
                return f"message {i}: expected a text as 'content', got {came}"
        elif not isinstance(content, str | list | tuple):
            return f"message {i}: expected a text as 'content', got {_described(content)}"
        else:
            try:
                problem = problem_in_text(text_of(content))
            except ValueError as error:
                problem = str(error)
            if problem is not None:
                return f"message {i}: {problem}"
        problem = problem_in_text(message["role"])
        if problem is not None:
            return f"message {i}, 'role': {problem}"
    return None


def problem_in_tools(value: Any) -> str | None:
    """What is wrong with a record's ``tools``, to be put behind its place, or None."""
    return _problem_in_cell(value, "a list of tools", _problem_in_tools)


def problem_in_settings(value: Any) -> str | None:
    """What is wrong with a record's ``chat_template_kwargs``, to be put behind its place, or None."""
    return _problem_in_cell(value, "an object of variables", _problem_in_settings)


def _problem_in_cell(value: Any, expected: str, check: Callable[[Any], str | None]) -> str | None:
    """What is wrong with what a cell holds, as it is or as JSON."""
    try:
        found = _parsed(value)
    except ValueError as error:
        return f"expected {expected}, got a text that is no JSON ({error})"
    return None if found is None else check(found)


def _problem_in_tools(tools: Any) -> str | None:
    if not isinstance(tools, list | tuple):
        return f"expected a list of tools, each a JSON schema, got {_described(tools)}"
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping) and not callable(tool):
            return f"tool {i}: expected a JSON schema (an object), got {_described(tool)}"
    return None


def _problem_in_settings(given: Any) -> str | None:
    if not isinstance(given, Mapping):
        return f"expected an object, the template's variables by name, got {_described(given)}"
    strange = [name for name in given if not isinstance(name, str)]
    if strange:
        return f"expected names of variables, got {_described(strange[0])}"
    taken = sorted(_TAKEN & given.keys())
    return f"{taken[0]!r} is set for the template already" if taken else None


def problem_in_text(text: str) -> str | None:
    """Why no tokenizer takes a text, or None: JSON can write half a character, which Python reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"character {error.start + 1} is half of a surrogate pair, which no tokenizer takes"
    return None


def _described(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def answer_of(completion: Any) -> str:
    """The text of a completion; of a message list, that of its last message."""
    return completion if isinstance(completion, str) else text_of(completion[-1].get("content"))


def readable(messages: Messages) -> str:
    """A message list as text for people, without any template: the content alone if there is one message."""
    if len(messages) == 1:
        return text_of(messages[0].get("content"))
    return "\n".join(f"{message['role']}: {text_of(message.get('content'))}" for message in messages)


def joined(prompt: Any, completion: Any) -> tuple[list[Mapping[str, Any]], int]:
    """Prompt and completion, of which either may be a text, as one conversation.

    A completion that starts with anything but the assistant's turn is the whole conversation already. An assistant's
    turn at the end of the prompt is continued by the completion.

    Returns:
        The messages, and how many of them are the prompt.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    answer_turns = (
        [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    )
    if not answer_turns:
        raise ValueError("a completion needs at least one message, got an empty list")
    if answer_turns[0].get("role") not in ("assistant", "tool"):
        begins_with_prompt = (
            not isinstance(prompt, str)
            and answer_turns[: len(turns)] == turns
            and len(answer_turns) > len(turns)
        )
        return answer_turns, len(turns) if begins_with_prompt else len(answer_turns) - 1
    if turns and turns[-1].get("role") == "assistant" and answer_turns[0].get("role") == "assistant":
        begun = text_of(turns[-1].get("content")) + text_of(answer_turns[0].get("content"))
        answer_turns = [{**answer_turns[0], "content": begun}, *answer_turns[1:]]
        turns = turns[:-1]
    return [*turns, *answer_turns], len(turns)


def split_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected completion of a comparison that has no prompt of its own.

    The prompt is what both sides start with: messages, or of texts the characters up to the last word that they
    share (up to "Assistant:" where both have it there, as in the helpful and harmless data of Bai et al. 2022).

    Raises:
        ValueError: The sides share no beginning, or one is a text and the other is not, or one has nothing left.
    """
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("one of 'chosen' and 'rejected' is a text, the other a list of messages")
    if isinstance(chosen, str):
        shared = chosen[: _common_prefix(chosen, rejected)]
        marker = shared.rfind("\n\nAssistant:")
        if marker >= 0:
            length = marker + len("\n\nAssistant:")
        else:
            length = max((m.start() for m in re.finditer(r"\s+", shared)), default=0)
    else:
        chosen, rejected = list(chosen), list(rejected)
        length = 0
        while length < min(len(chosen), len(rejected)) - 1 and chosen[length] == rejected[length]:
            length += 1
    if length == 0:
        raise ValueError("there is no 'prompt', and 'chosen' and 'rejected' have no beginning in common")
    return chosen[:length], chosen[length:], rejected[length:]


def _past_opening(content: str, opened: re.Match | None) -> str:
    """What an answer says behind the tag that the generation prompt has opened for it already."""
    tag = "" if opened is None else f"<{opened[1]}>"
    if not tag or not content.lstrip().startswith(tag):
        return content
    content = content.lstrip().removeprefix(tag)
    return content.removeprefix(opened[0][len(tag) :])


def _excerpt(text: str, other: str) -> str:
    """A few words of a text, from shortly before it differs from the other."""
    start = max(_common_prefix(text, other) - 12, 0)
    return repr(text[start : start + 48])


def _parsed(value: Any) -> Any:
    """A cell that may be JSON; an empty one of a .csv file is None."""
    return (json.loads(value) if value.strip() else None) if isinstance(value, str) else value


def _any_of(tokens: Sequence[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def _common_prefix(one: str, other: str) -> int:
    """How many characters two texts begin with alike, by bisection."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one.startswith(other[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


def _common_suffix(one: str, other: str) -> int:
    return _common_prefix(one[::-1], other[::-1])


def _squeezed(text: str) -> str:
    return "".join(text.split())
