"""Who says which of two answers is better: a score, or a language model behind an OpenAI-style endpoint.

    judge = load_judge("gold")                                  # the embedded world's rubric
    judge = load_judge("path/to/reward_model")                  # anything that load_reward takes
    judge = OpenAIJudge("http://127.0.0.1:8000/v1", "my-model") # vLLM, llama.cpp, Ollama, OpenAI, ...

A judge is a :class:`~reward_models.base.Reward` (it scores answers one by one), or an object with
``compare(prompts, first, second) -> list[float]``: 1 where the first is better, 0 where the second is, 0.5 for a tie.

Left out: judging several answers in one question, and answers that are streamed.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

from reward_models import Reward, load_reward
from textrl_env import embedded

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
        timeout: Seconds to wait for one answer.
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
        if not re.match(r"https?://", base_url):
            raise ValueError(
                f"base_url must start with http:// or https://, got {base_url!r}; "
                "for example http://127.0.0.1:8000/v1"
            )
        missing = [field for field in ("{prompt}", "{first}", "{second}") if field not in rubric]
        if missing:
            raise ValueError(
                f"the rubric must hold {', '.join(missing)}: there the request and the answers go"
            )
        self.url = base_url.rstrip("/") + "/chat/completions"
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
        pool = ThreadPoolExecutor(max_workers=self.workers)
        try:
            replies = list(pool.map(lambda question: self.ask(*question), questions))
        finally:
            pool.shutdown(cancel_futures=True)
        verdicts = [parse_verdict(reply) for reply in replies]
        self.unclear += sum(verdict is None for verdict in verdicts)
        straight, swapped = verdicts[: len(rows)], verdicts[len(rows) :]
        agreed = [
            a is not None and b is not None and a == 1 - b for a, b in zip(straight, swapped, strict=True)
        ]
        return [verdict if same else 0.5 for verdict, same in zip(straight, agreed, strict=True)]

    def ask(self, prompt: str, first: str, second: str) -> str:
        """The model's reply to one question."""
        # Not str.format: answers and rubrics may hold braces of their own.
        parts = {"{prompt}": prompt, "{first}": first, "{second}": second}
        content = re.sub(r"\{prompt\}|\{first\}|\{second\}", lambda match: parts[match[0]], self.rubric)
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        } | self.request
        answer = self._post({name: value for name, value in body.items() if value is not None})
        try:
            return answer["choices"][0]["message"]["content"] or ""
        except (KeyError, IndexError, TypeError):
            raise ValueError(
                f"the judge at {self.url} returned no chat completion but {json.dumps(answer)[:200]}; "
                "is it an OpenAI-style endpoint?"
            ) from None

    def _post(self, body: dict[str, Any]) -> Any:
        wait = self.retry_wait
        for attempt in range(self.retries + 1):
            last = attempt == self.retries
            try:
                return self._post_once(body)
            except urllib.error.HTTPError as error:
                if last or error.code not in _PASSING:
                    raise ConnectionError(self._explain(error)) from None
            except (OSError, http.client.HTTPException) as error:
                if last:
                    raise ConnectionError(self._explain_silence(error)) from None
            time.sleep(wait)
            wait *= 2
        raise AssertionError("the last attempt returns or raises")

    def _post_once(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.api_key_env)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            text = response.read().decode("utf-8", errors="replace")
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise ValueError(f"the judge at {self.url} returned no JSON but {text[:200]!r}") from None

    def _explain(self, error: urllib.error.HTTPError) -> str:
        said = " ".join(error.read(500).decode("utf-8", errors="replace").split())
        if error.code in (401, 403):
            state = "is set" if os.environ.get(self.api_key_env) else "is not set"
            hint = f"the key is read from the environment variable {self.api_key_env}, which {state}"
        elif error.code == 404:
            hint = (
                f"does base_url end with its version (/v1), and does the server have a model {self.model!r}?"
            )
        elif error.code == 429:
            hint = "too many questions; lower workers or raise retry_wait"
        else:
            hint = f"tried {self.retries + 1} times" if error.code in _PASSING else "the request was refused"
        return f"the judge at {self.url} answered {error.code} {error.reason}: {said or 'nothing'} ({hint})"

    def _explain_silence(self, error: Exception) -> str:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            return (
                f"the judge at {self.url} did not answer within {self.timeout:g} seconds, "
                f"{self.retries + 1} times; raise timeout, or lower workers"
            )
        return f"nothing answers at {self.url}: {reason}; is the server running?"


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
