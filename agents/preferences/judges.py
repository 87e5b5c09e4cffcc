"""Who says which of two answers is better: a score, or a language model behind an OpenAI-style endpoint.

    judge = load_judge("gold")                                  # the embedded world's rubric
    judge = load_judge("path/to/reward_model")                  # anything that load_reward takes
    judge = OpenAIJudge("http://127.0.0.1:8000/v1", "my-model") # vLLM, llama.cpp, Ollama, OpenAI, ...

A judge is a :class:`~reward_models.base.Reward` (it scores answers one by one), or an object with
``compare(prompts, first, second) -> list[float]``: 1 where the first is better, 0 where the second is, 0.5 for a tie.

The key goes to the host of ``base_url`` and nowhere else: redirects are refused, and it is blotted out of every
message. Left out: judging several answers in one question, and answers that are streamed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable
from urllib.parse import quote, unquote

import anyio
import httpx
from anyio.from_thread import start_blocking_portal
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from reward_models import Reward, load_reward
from reward_models.names import shorten
from textrl_env import embedded
from textrl_env.printable import printable

#: What an LLM judge is told; {prompt}, {first} and {second} are filled in.
RUBRIC = """You compare two answers to the same request. The better answer is correct, helpful, polite and concise, \
refuses what would do harm, and admits what it cannot know. Their order and their length say nothing about their \
quality.

[Request]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Which answer is better? Reply with one letter, A or B, or with C if neither is."""

_VERDICTS = {"A": 1.0, "B": 0.0, "C": 0.5}
#: Statuses that another attempt may cure.
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
#: Bytes of an answer; a verdict is a letter.
_MOST_BYTES = 4 * 2**20


class _MayPassError(ConnectionError):
    """Another attempt may cure it."""


@runtime_checkable
class Judge(Protocol):
    """What says which of two answers is better."""

    def compare(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """1 where the first of two answers is better, 0 where the second is, 0.5 where neither, ``N`` of them."""
        ...


class OpenAIJudge:
    """A language model behind ``POST {base_url}/chat/completions`` that compares answers.

    Each pair is asked about twice, in both orders, so that a liking for the first place cancels out: only a verdict
    that names the same answer both times counts, anything else is a tie.

    Args:
        base_url: Of the API, with its version: "https://api.openai.com/v1", "http://127.0.0.1:8000/v1".
        model: What the server calls the model.
        api_key_env: The environment variable that holds the key; no key is sent where it is not set.
        rubric: The question, a text with ``{prompt}``, ``{first}`` and ``{second}``; asks for A, B or C.
        timeout: Seconds for one question, from connecting to the last byte of its answer.
        retries: Further attempts after a timeout, a dropped connection, or a status that may pass (429, 503, ...).
        retry_wait: Seconds before the first further attempt; doubles with each.
        workers: Questions in flight at once.
        max_tokens: Budget of a verdict; a model that thinks first needs more.
        request: Further fields of the request, or others in place of ours; None leaves a field out, as in
            ``{"max_tokens": None, "max_completion_tokens": 2000}``.

    Attributes:
        unclear: Verdicts so far in which neither A, B nor C was found; they count as ties.
    """

    name = "llm"

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_env: str = "OPENAI_API_KEY",
        rubric: str = RUBRIC,
        timeout: float = 60.0,
        retries: int = 3,
        retry_wait: float = 1.0,
        workers: int = 4,
        max_tokens: int = 16,
        request: dict[str, Any] | None = None,
    ) -> None:
        if not re.match(r"https?://[^/]", base_url):
            raise ValueError(
                f"base_url must start with http:// or https://, got {base_url!r}; "
                "for example http://127.0.0.1:8000/v1"
            )
        missing = [field for field in ("{prompt}", "{first}", "{second}") if field not in rubric]
        if missing:
            raise ValueError(
                f"the rubric must hold {', '.join(missing)}: there the request and the answers go"
            )
        url = httpx.URL(base_url)
        if url.query or url.fragment:
            raise ValueError(
                f"base_url must end with a path such as /v1, got {str(url.copy_with(userinfo=b''))!r}"
            )
        # Apart from the address, so that a password is in no message and no log.
        self._login = (unquote(url.username), unquote(url.password)) if url.userinfo else None
        self.url = str(url.copy_with(userinfo=b"")).rstrip("/") + "/chat/completions"
        self.model, self.api_key_env, self.rubric = model, api_key_env, rubric
        self.timeout, self.retries, self.retry_wait = timeout, retries, retry_wait
        self.workers, self.max_tokens, self.request = workers, max_tokens, dict(request or {})
        self.unclear = 0

    def compare(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """1 where the first answer is better in both orders, 0 where the second is, otherwise 0.5.

        Args:
            prompts: ``N`` requests.
            first: An answer to each.
            second: Another answer to each.

        Raises:
            ConnectionError: The server cannot be reached or refuses; the message says what to look at.
            ValueError: It answers with something that is no chat completion.
        """
        rows = list(zip(prompts, first, second, strict=True))
        questions = [(p, a, b) for p, a, b in rows] + [(p, b, a) for p, a, b in rows]
        replies = self._in_a_loop(questions)
        verdicts = [parse_verdict(reply) for reply in replies]
        self.unclear += sum(verdict is None for verdict in verdicts)
        straight, swapped = verdicts[: len(rows)], verdicts[len(rows) :]
        agreed = [
            a is not None and b is not None and a == 1 - b for a, b in zip(straight, swapped, strict=True)
        ]
        return [verdict if same else 0.5 for verdict, same in zip(straight, agreed, strict=True)]

    def ask(self, prompt: str, first: str, second: str) -> str:
        """The model's reply to one question."""
        return self._in_a_loop([(prompt, first, second)])[0]

    def _in_a_loop(self, questions: Sequence[tuple[str, str, str]]) -> list[str]:
        """All replies, from an event loop of their own: a thread may be running one (in a notebook) already."""
        with start_blocking_portal() as portal:
            return portal.call(self._ask_all, questions)

    async def _ask_all(self, questions: Sequence[tuple[str, str, str]]) -> list[str]:
        replies = [""] * len(questions)
        limit = anyio.CapacityLimiter(self.workers)
        failed: list[Exception] = []

        async def ask(index: int) -> None:
            async with limit:
                try:
                    replies[index] = await self._ask(client, *questions[index])
                except Exception as error:
                    failed.append(error)
                    tasks.cancel_scope.cancel()

        # The time limit is set around a whole question, since httpx's own are for single reads.
        settings: dict[str, Any] = {"timeout": None, "follow_redirects": False, "auth": self._login}
        async with httpx.AsyncClient(**settings) as client, anyio.create_task_group() as tasks:
            for index in range(len(questions)):
                tasks.start_soon(ask, index)
        if failed:
            raise failed[0]
        return replies

    async def _ask(self, client: httpx.AsyncClient, prompt: str, first: str, second: str) -> str:
        # Not str.format: answers and rubrics may hold braces of their own.
        parts = {"{prompt}": prompt, "{first}": first, "{second}": second}
        content = re.sub(r"\{prompt\}|\{first\}|\{second\}", lambda match: parts[match[0]], self.rubric)
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        } | self.request
        body = {name: value for name, value in body.items() if value is not None}
        attempts = AsyncRetrying(
            stop=stop_after_attempt(self.retries + 1),
            wait=wait_exponential(multiplier=self.retry_wait),
            retry=retry_if_exception_type(_MayPassError),
            sleep=anyio.sleep,
            reraise=True,
        )
        return self._content(await attempts(self._post, client, body))

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Any:
        """One attempt: the parsed answer."""
        key = self._key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            with anyio.fail_after(self.timeout):
                async with client.stream("POST", self.url, json=body, headers=headers) as response:
                    data = await self._read(response)
        except TimeoutError:
            raise _MayPassError(
                f"the judge at {self.url} did not answer within {self.timeout:g} seconds, "
                f"{self.retries + 1} times; raise timeout, or lower workers"
            ) from None
        except (httpx.TransportError, OSError) as error:
            raise _MayPassError(
                self._blot(f"nothing answers at {self.url}: {error}; is the server running?")
            ) from None
        except UnicodeEncodeError:
            raise ValueError(f"the key in {self.api_key_env} holds characters that no header may") from None
        if response.is_redirect:
            raise ConnectionError(self._redirected(response))
        text = data.decode("utf-8", errors="replace")
        if not response.is_success:
            kind = _MayPassError if response.status_code in _PASSING else ConnectionError
            raise kind(self._explain(response, text))
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(
                self._blot(f"the judge at {self.url} returned no JSON but {text[:200]!r}")
            ) from None

    async def _read(self, response: httpx.Response) -> bytes:
        data = bytearray()
        async for chunk in response.aiter_bytes():
            data += chunk
            if len(data) > _MOST_BYTES:
                raise ValueError(
                    f"the judge at {self.url} sent more than {_MOST_BYTES:,} bytes for a verdict"
                )
        return bytes(data)

    def _content(self, answer: Any) -> str:
        try:
            content = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            shown = json.dumps(answer)[:200]
            raise ValueError(
                self._blot(
                    f"the judge at {self.url} returned no chat completion but {shown}; "
                    "is it an OpenAI-style endpoint?"
                )
            ) from None
        if content is not None and not isinstance(content, str):
            raise ValueError(
                self._blot(
                    f"the judge at {self.url} returned a content of type {type(content).__name__} "
                    f"({shorten(content)}); expected a text"
                )
            )
        return content or ""

    def _key(self) -> str:
        return os.environ.get(self.api_key_env, "").strip()

    def _blot(self, text: str) -> str:
        """``text`` without the key and the password, also where a server has echoed them."""
        secrets = {self._key(), self._login[1] if self._login else ""} - {""}
        forms = {
            form for secret in secrets for form in (secret, quote(secret, safe=""), json.dumps(secret)[1:-1])
        }
        for form in sorted(forms, key=len, reverse=True):
            text = text.replace(form, "[secret]")
        return text

    def _redirected(self, response: httpx.Response) -> str:
        target = response.next_request.url if response.next_request is not None else None
        where = "elsewhere" if target is None else f"the host {target.host}"
        return self._blot(
            f"the judge at {self.url} answered {response.status_code} and points to {where}; the question and the "
            "key were not sent there. Give base_url as the server has it now"
        )

    def _explain(self, response: httpx.Response, text: str) -> str:
        status = response.status_code
        if status in (401, 403):
            state = "is set" if self._key() else "is not set"
            hint = f"the key is read from the environment variable {self.api_key_env}, which {state}"
        elif status == 404:
            hint = (
                f"does base_url end with its version (/v1), and does the server have a model {self.model!r}?"
            )
        elif status == 429:
            hint = "too many questions; lower workers or raise retry_wait"
        else:
            hint = f"tried {self.retries + 1} times" if status in _PASSING else "the request was refused"
        # Blotted before it is cut, so that no part of a secret is left at the end.
        answered = printable(" ".join(self._blot(text).split())[:500]) or "nothing"
        reason = printable(self._blot(response.reason_phrase))
        return f"the judge at {self.url} answered {status} {reason}: {answered} ({hint})"


def parse_verdict(reply: str) -> float | None:
    """1, 0 or 0.5 for A, B or C; None where the reply names none.

    A reply of one letter, or the last letter that stands alone in a longer one ("Answer A is rude, so B").
    """
    letters = re.findall(r"(?<![\w'])([ABC])(?![\w'])", reply.strip())
    return _VERDICTS[letters[-1]] if letters else _VERDICTS.get(reply.strip().upper())


def load_judge(spec: Any, **llm_settings: Any) -> Reward | Judge:
    """A judge from "gold", "reward" (both of the embedded world), a URL, or anything that ``load_reward`` takes.

    Args:
        spec: "gold", "reward", "http://..." (then ``model`` must be among the settings), a reward of any form, or
            an object with ``compare``.
        **llm_settings: Arguments of :class:`OpenAIJudge`, for a URL.
    """
    if isinstance(spec, str) and re.match(r"https?://", spec):
        if not llm_settings.get("model"):
            raise ValueError(f"the judge at {spec} needs the name of its model: model=... (--judge-model)")
        return OpenAIJudge(spec, **llm_settings)
    if isinstance(spec, str) and spec in ("gold", "reward"):
        return load_reward(embedded.gold_score if spec == "gold" else embedded.path("reward"))
    if isinstance(spec, Reward | Judge):
        return spec
    return load_reward(spec)
