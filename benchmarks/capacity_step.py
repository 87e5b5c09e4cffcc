"""One step of reinforcement learning from human feedback as arithmetic: memory, time and network of one GPU.

:class:`Step` puts the formulas of ``benchmarks/llama_costs.py`` together for policy, reference, reward model and
critic. Left out: tensor and pipeline parallelism, overlap of network and arithmetic (times are sums), what an
allocator wastes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from benchmarks import llama_costs as costs
from benchmarks.llama_costs import Shape


class Device(NamedTuple):
    """Dense bfloat16 FLOP/s, memory bytes/s, memory bytes, and bytes/s to a GPU of the same node, one way."""

    flops: float
    bandwidth: float
    memory: float
    link: float


#: Nominal figures from the vendor's data sheets.
DEVICES = {
    "A100": Device(312e12, 2.039e12, 80e9, 300e9),
    "H100": Device(989e12, 3.35e12, 80e9, 450e9),
    "H200": Device(989e12, 4.8e12, 141e9, 450e9),
    "L40S": Device(362e12, 0.864e12, 48e9, 32e9),
    "L4": Device(121e12, 0.3e12, 24e9, 32e9),
    "RTX-4090": Device(165e12, 1.008e12, 24e9, 32e9),
}
GPUS_IN_A_NODE = 8
#: Bytes/s between a GPU and the host's memory, one way: nominally 32e9 of PCIe 4.
HOST_LINK = 25e9


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: respond to prompts, score, update. Bytes and seconds are those of one GPU.

    Attributes:
        policy: Shape of the policy and of the reference.
        reward: Shape of the reward model; None for a function that costs nothing.
        device: The GPU.
        gpus: How many.
        sharding: "full" splits every state over the GPUs, "none" repeats it on each, "learned" is what ``shard=True``
            does: weights, gradients and moments of what learns are split, and every GPU holds the weights whole once
            more, in float32, beside whole frozen models.
        critic: "none", "head" (on the policy's hidden states) or "separate" (a body of its own).
        episodes, prompt, response: Sequences in a step, and their tokens.
        group: Sequences that share a prompt; it is read once, when decoding and in every micro-batch.
        micro: Rows of a micro-batch.
        epochs: Passes over the episodes.
        precision: One of ``llama_costs.PRECISIONS``.
        lora_rank: 0 learns every weight; with LoRA the reference is the policy without its adapter.
        eight_bit: 8-bit optimiser.
        four_bit: Weights under an adapter in four bits, those of the layers' matrices.
        offload: Frozen models and the copy to decode with are in the host's memory during the update.
        checkpointing: Layers computed again when going backward.
        logits_at_once: Logits held at a time in the update; None for those of the whole micro-batch.
        mfu, mbu: Share of the device's FLOP/s and memory bandwidth that is reached.
        layer_seconds: What the host needs to launch one layer's forward pass.
        recorded: Token steps are one launch (CUDA graphs), so that the host bounds passes only.
        host_waits: Whether that time is spent beside the device's (a CPU) or at the same time (a GPU).
        node_bandwidth: Bytes/s that leave a node of eight GPUs.
        reserve: Bytes that are not ours: context, kernels, fragments.
    """

    policy: Shape
    reward: Shape | None = None
    device: Device = DEVICES["H100"]
    gpus: int = 1
    sharding: str = "full"
    critic: str = "none"
    episodes: int = 512
    prompt: int = 256
    response: int = 512
    group: int = 8
    micro: int = 8
    epochs: int = 1
    precision: str = "autocast"
    lora_rank: int = 0
    eight_bit: bool = False
    four_bit: bool = False
    offload: bool = False
    checkpointing: bool = False
    logits_at_once: float | None = 8e6
    mfu: float = 0.4
    mbu: float = 0.6
    layer_seconds: float = 0.0
    recorded: bool = False
    host_waits: bool = False
    node_bandwidth: float = 400e9
    reserve: float = 2e9

    # -- sizes ----------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Episodes of one GPU."""
        return math.ceil(self.episodes / self.gpus)

    @property
    def prompts(self) -> int:
        """Distinct prompts in a micro-batch."""
        return math.ceil(min(self.micro, self.rows) / self.group)

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes of one GPU in one epoch."""
        return math.ceil(self.rows / self.micro)

    @property
    def passes(self) -> int:
        """Times a micro-batch goes through the layers: prompts and responses apart where prompts are shared."""
        return 2 if self.group > 1 else 1

    @property
    def bodies(self) -> int:
        """Models that learn."""
        return 2 if self.critic == "separate" else 1

    @property
    def shards(self) -> int:
        """How many ways every state is split."""
        return self.gpus if self.sharding == "full" else 1

    @property
    def learned_shards(self) -> int:
        """How many ways the states of what learns are split."""
        return 1 if self.sharding == "none" else self.gpus

    @property
    def trainable(self) -> int:
        """Parameters of one body that learn."""
        adapter = self.lora_rank and costs.lora_parameter_count(self.policy, self.lora_rank)
        return adapter or costs.parameter_count(self.policy)

    @property
    def total(self) -> int:
        """Parameters of the policy, an adapter included."""
        return costs.parameter_count(self.policy) + (self.trainable if self.lora_rank else 0)

    # -- memory ---------------------------------------------------------------------------------------------

    def resident_bytes(self) -> dict[str, float]:
        """What lies on a GPU all the time."""
        states = costs.state_bytes(
            self.total, self.trainable, self.precision, self.eight_bit, self._four_bit_weights()
        )
        frozen = costs.frozen_bytes(self.precision)
        # Under autocast the weights come with a copy to decode with, which a critic does not.
        spare = 2 * self.trainable * (self.bodies - 1) if self.precision == "autocast" else 0
        weights = (self.bodies * states["weights"] - spare) / self.shards
        if self.sharding == "learned":
            weights = self.bodies * 4 * self.trainable / self.gpus + (4 + self._copy_element) * self.total
        return {
            "policy and critic": weights,
            "gradients": self.bodies * states["gradients"] / self.learned_shards,
            "optimiser": self.bodies * states["optimizer"] / self.learned_shards,
            "reference": 0.0 if self.lora_rank else frozen * self.total / self.shards,
            "reward model": self.reward_bytes() / self.shards,
        }

    @property
    def _copy_element(self) -> int:
        """Bytes of a weight in the copy to decode with."""
        return 2 if self.precision == "autocast" else 0

    def _four_bit_weights(self) -> int:
        return (
            self.policy.layers * costs.layer_matrices(self.policy) if self.four_bit and self.lora_rank else 0
        )

    def reward_bytes(self) -> float:
        """Of the whole reward model."""
        count = 0 if self.reward is None else costs.parameter_count(self.reward)
        return costs.frozen_bytes(self.precision) * count

    def offloaded_bytes(self) -> float:
        """What is in the host's memory during the update: frozen models; the copy to decode with is given up too."""
        resident = self.resident_bytes()
        return resident["reference"] + resident["reward model"] if self.offload else 0.0

    def _absent_in_update(self) -> float:
        copy = self._copy_element * (0 if self.lora_rank else self.total) / self.shards
        return self.offloaded_bytes() + (copy if self.offload else 0.0)

    def gathered_bytes(self) -> float:
        """Whole weights beside the shards while decoding; none where nothing is split."""
        return costs.frozen_bytes(self.precision) * self.total if self.shards > 1 else 0.0

    def row_bytes(self) -> float:
        """Cache and logits of one row while decoding."""
        element = costs.frozen_bytes(self.precision)
        return costs.kv_bytes(self.policy, self.prompt + self.response, element) + 3 * 4 * self.policy.vocab

    def decode_rows(self) -> int:
        """Rows decoded together: all of them, or as many as the memory holds; 0 if none fits."""
        used = self.reserve + sum(self.resident_bytes().values()) + self.gathered_bytes()
        return max(min(self.rows, int((self.device.memory - used) // self.row_bytes())), 0)

    def update_bytes(self) -> float:
        """What a micro-batch needs on top, forward and backward."""
        states = costs.state_bytes(self.total, self.trainable, self.precision)
        logits = costs.logit_bytes(
            self.policy, min(self.micro, self.rows) * self.response, self.logits_at_once
        )
        prompts, responses = self._activations()
        if (
            self.learned_shards > 1
        ):  # two layers are gathered at a time, and each pass sends its own gradients away
            layers = 2 * costs.layer_matrices(self.policy) + self.policy.vocab * self.policy.hidden
            return self.bodies * (prompts + responses) + logits + costs.frozen_bytes(self.precision) * layers
        # Both passes use the same weights, so the gradients of the first to go back wait for the second's.
        waiting = states["waiting"] if self.passes > 1 else 0.0
        return self.bodies * (states["cast"] + prompts + max(responses, waiting)) + logits

    def _activations(self) -> tuple[float, float]:
        """Bytes kept of the pass over the prompts and of that over the responses; of both together without groups."""
        rows, shared = min(self.micro, self.rows), self.group > 1
        keys = costs.key_elements(self.policy, rows, self.prompt, self.response, shared)
        tokens = rows * (self.response if shared else self.prompt + self.response)
        responses = costs.activation_bytes(self.policy, tokens, keys, self.precision, self.checkpointing)
        keys = costs.key_elements(self.policy, self.prompts, self.prompt, 0, False)
        tokens = self.prompts * self.prompt
        prompts = costs.activation_bytes(self.policy, tokens, keys, self.precision, self.checkpointing)
        return (prompts if shared else 0.0), responses

    def peak_bytes(self) -> float:
        """The larger of decoding and updating, on top of what lies there all the time."""
        decoding = self.gathered_bytes() + max(self.decode_rows(), 1) * self.row_bytes()
        updating = self.update_bytes() - self._absent_in_update()
        return self.reserve + sum(self.resident_bytes().values()) + max(decoding, updating)

    def fits(self) -> bool:
        """Whether at least one row can be decoded and a micro-batch updated."""
        return self.decode_rows() > 0 and self.peak_bytes() <= self.device.memory

    def largest(self) -> float:
        """Parameters of the largest policy that fits with everything else as it is; 0 if none does."""
        low, high = 0.0, 1e13
        for _ in range(40):
            middle = (low + high) / 2
            try:
                shape = costs.shape_for(middle, self.policy.vocab)
            except ValueError:  # smaller than its own embeddings
                return low
            fits = dataclasses.replace(self, policy=shape).fits()
            low, high = (middle, high) if fits else (low, middle)
        return low

    # -- time -----------------------------------------------------------------------------------------------

    def waves(self) -> int:
        """How many times over a GPU decodes, where the cache does not hold all of its rows at once."""
        return math.ceil(self.rows / max(self.decode_rows(), 1))

    def token_seconds(self) -> dict[str, float]:
        """Bounds on decoding one token for each row of a wave: by memory, by arithmetic, by the host."""
        rows, context = math.ceil(self.rows / self.waves()), self.prompt + self.response / 2
        element = costs.frozen_bytes(self.precision)
        read = costs.read_bytes(self.policy, rows, context, element, element)
        read += costs.logit_traffic(self.policy, rows, "sample")
        flops = costs.forward_flops(self.policy, rows, context, rows)
        return {
            "memory bandwidth": read / (self.mbu * self.device.bandwidth),
            "arithmetic": flops / (self.mfu * self.device.flops),
            "host": 0.0 if self.recorded else self.layer_seconds * self.policy.layers,
        }

    def _together(self, device_seconds: float, host_seconds: float) -> float:
        return device_seconds + host_seconds if self.host_waits else max(device_seconds, host_seconds)

    def decode_seconds(self) -> float:
        """Responses to all prompts of one GPU, in as many waves as the cache takes."""
        bounds = self.token_seconds()
        token = self._together(max(bounds["memory bandwidth"], bounds["arithmetic"]), bounds["host"])
        prompts = math.ceil(self.rows / self.group) * self.prompt
        prefill = costs.forward_flops(self.policy, prompts, self.prompt) / (self.mfu * self.device.flops)
        return self.waves() * self.response * token + prefill

    def pass_seconds(self, shape: Shape, logits: float = 1.0) -> float:
        """One forward pass of a model over all episodes of one GPU.

        Args:
            shape: The model.
            logits: How many times over the logits are computed; 0 for a model without a vocabulary.
        """
        length, responses = self.prompt + self.response, self.rows * self.response
        prompts = self.rows if self.group == 1 else self.micro_batches * self.prompts
        flops = costs.forward_flops(shape, prompts * self.prompt, self.prompt if self.group > 1 else length)
        flops += costs.forward_flops(shape, responses, length, logits * responses)
        passes = self.micro_batches * self.passes
        return self._together(
            flops / (self.mfu * self.device.flops), passes * shape.layers * self.layer_seconds
        )

    def _logit_seconds(self, *kinds: str) -> float:
        traffic = costs.logit_traffic(self.policy, self.rows * self.response, *kinds)
        return traffic / (self.mbu * self.device.bandwidth)

    def seconds(self) -> dict[str, float]:
        """Seconds of every part of the step."""
        forward = self.pass_seconds(self.policy) + self._logit_seconds("forward")
        values = self.pass_seconds(self.policy, 0.0) if self.critic == "separate" else 0.0
        # For the values, and where it decodes in another precision, the policy looks again at what it has written.
        looks = 2 if self.critic != "none" or self.precision == "autocast" else 1
        # Backward computes gradients of activations and of weights; frozen weights have none. The logits are
        # computed again when going backward, which makes 4 thirds.
        passes = (2 if self.lora_rank else 3) + self.checkpointing
        again = 4 / 3 if self.logits_at_once else 1.0
        update = passes * (self.pass_seconds(self.policy, again) + values)
        update += self._logit_seconds("forward", "backward")
        # Adam reads four tensors and writes three; clipping reads one, then reads and writes it.
        adam = (
            10 * 4 * self.bodies * self.trainable / self.learned_shards / (self.mbu * self.device.bandwidth)
        )
        link = min(self.device.link, self.node_bandwidth) if self.gpus > GPUS_IN_A_NODE else self.device.link
        return {
            "decode": self.decode_seconds(),
            "reference and values": looks * forward + values,
            "reward model": 0.0 if self.reward is None else self.pass_seconds(self.reward, 0.0),
            "update": self.epochs * update,
            "optimiser": self.epochs * adam,
            "network": sum(self.network_bytes().values()) / link,
            "offloading": 2 * self.offloaded_bytes() / HOST_LINK,
        }

    # -- network --------------------------------------------------------------------------------------------

    def network_bytes(self) -> dict[str, float]:
        """What each GPU sends in a step: rings of all-gathers and reduce-scatters, ``(n - 1) / n`` of the payload."""
        frozen, ring = costs.frozen_bytes(self.precision), (self.gpus - 1) / self.gpus
        gradient = self.bodies * costs.state_bytes(self.total, self.trainable, self.precision)["gradients"]
        if self.sharding == "none":  # an all-reduce of the gradients, once in an epoch
            return {"gradients": 2 * self.epochs * ring * gradient}
        weights = self.bodies * frozen * self.total
        if (
            self.sharding == "learned"
        ):  # prompts are not shared in the update there; weights travel in float32
            passes, learned = self.micro_batches, self.bodies * 4 * self.trainable
            return {
                "weights to decode with": ring * 4 * self.trainable,
                "weights to update with": ring * self.epochs * passes * 2 * learned,
                "gradients": ring * self.epochs * passes * gradient,
            }
        passes = self.passes * self.micro_batches
        scoring = 0.0 if self.lora_rank else frozen * self.total
        scoring += 0.0 if self.reward is None else frozen * costs.parameter_count(self.reward)
        return {
            "weights to decode with": ring * frozen * self.total,
            "frozen models": ring * passes * scoring,
            "weights to update with": ring * self.epochs * passes * 2 * weights,
            "gradients": ring * self.epochs * passes * gradient,
        }
