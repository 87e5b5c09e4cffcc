"""Our own decoder behind the protocol of an outside generator, off on purpose."""

from __future__ import annotations

import copy

import torch

from tests.tiny import make_lm
from textrl_env.generators import Generated
from textrl_env.lm import generate


class OffGenerator:
    """Samples with weights of its own.

    Args:
        temperature: Multiplies the one that is asked for.
        noise: Standard deviation of what is added to every weight.
        stale: How many updates the weights are behind.
        shift: Added to the log-probabilities that are reported, in nats.
    """

    def __init__(
        self, temperature: float = 1.0, noise: float = 0.0, stale: int = 0, shift: float = 0.0
    ) -> None:
        self.temperature, self.noise, self.stale, self.shift = temperature, noise, stale, shift
        self.lm = make_lm().clone()
        self.received: list[dict[str, torch.Tensor]] = []
        self.asked: list = []

    def update_weights(self, model) -> None:
        self.received.append(copy.deepcopy(model.state_dict()))

    def generate(self, prompts, sampling):
        self.asked.append(sampling)
        self.lm.model.load_state_dict(self.received[max(0, len(self.received) - 1 - self.stale)])
        stream = torch.Generator().manual_seed(sampling.seed)
        with torch.no_grad():
            for weight in self.lm.model.parameters() if self.noise else ():
                weight.add_(self.noise * torch.randn(weight.shape, generator=stream))
        self.lm.temperature = sampling.temperature * self.temperature
        responses, log_probs = generate(
            self.lm, prompts, sampling.max_new_tokens, stream, sampling.deterministic
        )
        stopped_by = ["eos" if tokens[-1] in sampling.eos_ids else "length" for tokens in responses]
        return Generated(responses, [row + self.shift for row in log_probs], stopped_by)
