"""A vLLM server: responses over HTTP, weights through a folder that both sides see.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs
    textrl train --model MODEL --generator http://localhost:8000 ...

``--logprobs-mode processed_logprobs`` makes it report the log-probabilities of what was sampled, and its development
mode has the two calls by which new weights are read and old prompts forgotten. Whoever can reach the server can use
them too: it belongs on a network of one's own. A key, where it wants one, is read from ``VLLM_API_KEY``. Made for vLLM
0.32. Left out: servers on another file system, and vLLM's weight transfer between GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from reward_models.warning import warn
from textrl_env.generators.answers import Generated, GeneratorError
from textrl_env.generators.sampling import Sampling
from textrl_env.generators.vllm_params import WeightsFolder, plain_number, request_params

#: Times that one response is asked for where the connection is cut.
ATTEMPTS = 3
START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs"


class VllmServer:
    """The HTTP API of ``vllm serve`` behind the protocol of a generator.

    Args:
        url: Of the server, without a path.
        weights_folder: A folder that the server sees under the same name; None is a temporary one on this machine.
        timeout: Seconds that one response, or reading new weights, may take.
        at_once: Requests in flight.

    Raises:
        GeneratorError: Nothing answers there, or it is no vLLM server that this can work with.
    """

    #: Several processes of a run ask one server, which gets their weights once.
    serves_many = True

    def __init__(
        self,
        url: str,
        weights_folder: str | Path | None = None,
        timeout: float = 600.0,
        at_once: int = 256,
    ) -> None:
        self.url, self.at_once = url.rstrip("/"), at_once
        key = os.environ.get("VLLM_API_KEY")
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # A server hangs up on connections that have idled for some seconds, just when the next rollout wants them.
        limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=0)
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, limits=limits)
        self._folder = WeightsFolder(weights_folder)
        self.model = self._call("GET", "/v1/models")["data"][0]["id"]
        self.logprobs_mode = self._logprobs_mode()

    def _logprobs_mode(self) -> str:
        info = self._call("GET", "/server_info", params={"config_format": "json"})
        try:
            return info["vllm_config"]["model_config"]["logprobs_mode"]
        except (KeyError, TypeError):
            raise GeneratorError(
                f"the server at {self.url} does not say its logprobs_mode under /server_info; this client is made "
                "for vLLM 0.32"
            ) from None

    def _call(self, method: str, path: str, attempts: int = 1, **arguments: Any) -> Any:
        retrying = Retrying(
            retry=retry_if_exception(_is_cut),
            stop=stop_after_attempt(attempts),
            wait=wait_exponential(0.1),
            before_sleep=self._warn_again,
            reraise=True,
        )
        try:
            answer = retrying(self._client.request, method, path, **arguments)
        except httpx.TransportError as error:
            what = (
                "took longer than the timeout"
                if isinstance(error, httpx.TimeoutException)
                else "does not answer"
            )
            raise GeneratorError(
                f"the vLLM server at {self.url} {what} ({method} {path}: {type(error).__name__}: {error}); it is "
                f"started with: {START}"
            ) from error
        if answer.status_code in (404, 405) and not path.startswith("/v1/"):
            raise GeneratorError(
                f"the vLLM server at {self.url} has no {path}, by which weights are exchanged; start it in its "
                f"development mode: {START}"
            )
        if answer.is_error:
            raise GeneratorError(
                f"the vLLM server at {self.url} answered {answer.status_code} to {method} {path}: {answer.text[:500]}"
            )
        if not answer.content:
            return None
        try:
            return answer.json()
        except ValueError as error:
            raise GeneratorError(
                f"the server at {self.url} answered {method} {path} with no JSON: {answer.text[:200]!r}"
            ) from error

    def update_weights(self, model: Any) -> None:
        """Write the weights and have the server read them; what it has cached of prompts goes with the old ones."""
        folder = self._folder.write(model)
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._call("POST", "/collective_rpc", json=body)
        done = self._call("POST", "/reset_prefix_cache")
        if isinstance(done, dict) and not done.get("success", True):
            raise GeneratorError(
                f"the vLLM server at {self.url} still holds what it has cached with the old weights; is it in use by "
                "others?"
            )

    def generate(self, prompts: Sequence[np.ndarray], sampling: Sampling) -> Generated:
        """One response to each prompt; see :class:`~textrl_env.protocols.Generator`."""
        changed = sampling.truncated or sampling.temperature != 1.0
        if self.logprobs_mode != "processed_logprobs" and changed:
            raise GeneratorError(
                f"the vLLM server at {self.url} reports {self.logprobs_mode}, which with a temperature or cut sampling "
                f"are not the log-probabilities of what was sampled; start it with: {START}"
            )
        with ThreadPoolExecutor(min(self.at_once, len(prompts))) as pool:
            asked = [
                pool.submit(self._respond, prompt, request_params(sampling, number))
                for number, prompt in enumerate(prompts)
            ]
            try:
                choices = [future.result() for future in asked]
            except Exception:
                pool.shutdown(wait=False, cancel_futures=True)  # the rest is asked for in vain
                raise
        return Generated(
            [choice["token_ids"] for choice in choices],
            [[plain_number(x) for x in choice["logprobs"]["token_logprobs"]] for choice in choices],
            ["eos" if choice["finish_reason"] == "stop" else choice["finish_reason"] for choice in choices],
        )

    def _respond(self, prompt: np.ndarray, params: dict[str, Any]) -> dict[str, Any]:
        body = {"model": self.model, "prompt": prompt.tolist(), "return_token_ids": True} | params
        body = {name: value for name, value in body.items() if value is not None}
        # The seed is part of the body: asked again, it is the same response.
        (choice,) = self._call("POST", "/v1/completions", ATTEMPTS, json=body)["choices"]
        if choice.get("token_ids") is None or choice.get("logprobs") is None:
            raise GeneratorError(
                f"the server at {self.url} returned no token ids or no log-probabilities; this client is made for "
                "vLLM 0.32"
            )
        return choice

    def _warn_again(self, state: RetryCallState) -> None:
        cause = state.outcome.exception()
        warn(
            f"the vLLM server at {self.url} cut a connection ({type(cause).__name__}: {cause}) and is asked again for "
            "the same response"
        )


def _is_cut(error: BaseException) -> bool:
    """Whether a connection broke that stood; nobody there at all, and too slow, are no such thing."""
    broken = httpx.NetworkError | httpx.RemoteProtocolError
    return isinstance(error, broken) and not isinstance(error, httpx.ConnectError)
