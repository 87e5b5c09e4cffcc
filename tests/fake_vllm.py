"""A server that speaks as much of vLLM's HTTP API as the client uses, on a tiny model of ours; and ways to break it."""

from __future__ import annotations

import json
import threading
from collections.abc import Container
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from tests.tiny import make_lm
from textrl_env.generators.sampling import Sampling, limit_logits
from textrl_env.lm import generate


class FakeVllm(ThreadingHTTPServer):
    """Listens on a free port of this machine until it is closed.

    Args:
        logprobs_mode: What ``/server_info`` says.
        dev_mode: Whether the calls of vLLM's development mode are there.

    Attributes:
        change: What is done to a finished choice before it is sent.
        cut: Numbers of the completions, from 1, whose connections are cut.
        paths: What was called, in order.
    """

    daemon_threads = True
    request_queue_size = 128  # with five, as is usual, some systems refuse what comes at the same time

    def __init__(self, logprobs_mode: str = "processed_logprobs", dev_mode: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.logprobs_mode, self.dev_mode = logprobs_mode, dev_mode
        self.lm = make_lm().clone()
        self.change = lambda choice: choice
        self.cut: Container[int] = ()
        self.paths: list[str] = []
        self.bodies: list[dict] = []
        self.completions = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def complete(self, body: dict) -> dict:
        """One choice, as vLLM words it."""
        top_k = max(body["top_k"], 0)
        sampling = Sampling(
            body["max_tokens"],
            tuple(body["stop_token_ids"]),
            None,
            body["temperature"] or 1.0,
            body["top_p"],
            top_k,
            body["min_p"],
            body["min_tokens"],
        )
        stream = torch.Generator().manual_seed(body["seed"])
        made = generate(
            self.lm,
            [np.array(body["prompt"])],
            body["max_tokens"],
            stream,
            body["temperature"] == 0,
            limit_logits(sampling),
        )
        (response,), (log_probs,) = made
        stopped = int(response[-1]) in body["stop_token_ids"]
        return {
            "token_ids": response.tolist(),
            "logprobs": {"token_logprobs": log_probs.tolist()},
            "finish_reason": "stop" if stopped else "length",
        }


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.answer({"data": [{"id": "tiny"}]})
        elif self.path.startswith("/server_info") and self.server.dev_mode:
            self.answer({"vllm_config": {"model_config": {"logprobs_mode": self.server.logprobs_mode}}})
        else:
            self.answer({"detail": "Not Found"}, 404)

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        with server.lock:
            server.paths.append(self.path)
            server.bodies.append(body)
            if self.path == "/collective_rpc" and server.dev_mode:
                folder = Path(body["kwargs"]["weights_path"])
                server.lm.model.load_state_dict(load_file(folder / "model.safetensors"))
                self.answer({"results": [None]})
            elif self.path == "/reset_prefix_cache" and server.dev_mode:
                self.answer({"success": True})
            elif self.path == "/v1/completions":
                server.completions += 1
                if server.completions in server.cut:
                    self.connection.close()
                    return
                choice = server.change(server.complete(body))
                self.answer({"choices": [choice]}) if choice else self.answer({"error": "too long"}, 400)
            else:
                self.answer({"detail": "Not Found"}, 404)

    def answer(self, document: dict, status: int = 200) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
