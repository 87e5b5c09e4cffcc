"""LoRA: a language model that is another one plus low-rank adapters (Hu et al., 2021, arXiv:2106.09685).

    y = W x + (alpha / rank) B A x        B starts at zero

:class:`LoraLM` shares the frozen weights ``W`` with the model that it starts from, tensor for tensor, in a module
tree of its own. The model without the adapter therefore stays what it was, the reference of the KL costs no memory
of its own, and no switch has to be thrown between the two. Needs peft: ``pip install 'textrl-env[lora]'``.

Left out: adapters on embeddings, output heads and the experts of a mixture (which are no linear layers in
transformers), dropout inside the adapter.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from reward_models.loading import save_model
from textrl_env.errors import check_range, did_you_mean
from textrl_env.lm.causal_lm import CausalLM

#: Elements of each tensor that tell one model from another.
_SAMPLED = 64


@torch.no_grad()
def digest_of_weights(weights: Mapping[str, Tensor]) -> str:
    """A text that tells one model's weights from another's, from a few elements of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "dequantize"):
            tensor = tensor.dequantize()  # torchao's, of which single elements cannot be read
        every = max(1, tensor.numel() // _SAMPLED)
        digest.update(name.encode())
        digest.update(tensor.flatten()[::every].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def share(model: PreTrainedModel) -> PreTrainedModel:
    """A module tree of its own over the very weights of ``model``, frozen in the new tree only."""
    return copy.deepcopy(model, _shared(model, lambda p: True))


def _shared(model: PreTrainedModel, is_shared: Callable[[nn.Parameter], bool]) -> dict[int, Any]:
    """What a deep copy of ``model`` takes as it is: buffers and some of the parameters, frozen in the copy only."""
    shared = [p for p in model.parameters() if is_shared(p)]
    if getattr(
        model, "is_quantized", False
    ):  # its parameters hold more than a tensor, and nothing trains them
        memo: dict[int, Any] = {id(p): p.requires_grad_(False) for p in shared}
    else:
        memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in shared}
    return memo | {id(buffer): buffer for buffer in model.buffers()}


def add_adapter(
    model: PreTrainedModel, rank: int, alpha: float | None = None, targets: str | Sequence[str] = "all-linear"
) -> PreTrainedModel:
    """``model`` with float32 adapters, as a new tree that shares its weights; ``model`` itself is left alone.

    Args:
        model: A transformers model.
        rank: Of the adapter's matrices.
        alpha: The adapter's output is scaled by ``alpha / rank``; None is ``2 * rank``.
        targets: Names of linear layers of the body ("q_proj"), or "all-linear" for all of them.

    Raises:
        ImportError: peft is not installed.
        ValueError: A setting out of range, a layer that is not there, or a model that has adapters already.
    """
    check_range(1, lora_rank=rank)
    alpha = 2 * rank if alpha is None else alpha
    if not alpha > 0:
        raise ValueError(f"lora_alpha must be > 0, got {alpha}")
    check_no_adapter(model)
    names, transposed = _targets(model, targets)
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("lora_rank needs peft, the extra lora: pip install 'textrl-env[lora]'") from error
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path or None,
        r=rank,
        lora_alpha=alpha,
        target_modules=names,
        fan_in_fan_out=transposed,
    )
    adapted = inject_adapter_in_model(config, share(model)).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # steps of 1e-6 are lost in bfloat16 weights
            parameter.data = parameter.data.float()
    return adapted


def check_no_adapter(model: nn.Module) -> None:
    """Raise a ValueError for a model that carries peft adapters."""
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"a policy starts from a plain language model, got {type(model).__name__} with adapters of its own; "
            'merge them with model.merge_and_unload(), and train new ones with policy_kwargs={"lora_rank": 16}'
        )


def _targets(model: PreTrainedModel, targets: str | Sequence[str]) -> tuple[list[str], bool]:
    """Names of the layers to adapt, and whether they keep their weights transposed (GPT-2's do).

    A name is the last part of a layer's ("q_proj") where every module of that name can be adapted, otherwise whole.
    """
    if isinstance(targets, str) and targets != "all-linear":
        raise ValueError(
            f'lora_targets is "all-linear" or a list of names, got {targets!r}; try [{targets!r}]'
        )
    body = {id(module) for module in model.base_model.modules()}
    modules = {name: module for name, module in model.named_modules() if id(module) in body}
    linear = {name: layer for name, layer in modules.items() if isinstance(layer, (nn.Linear, Conv1D))}
    usable = {name: layer for name, layer in linear.items() if not _cannot_adapt(model, name)}
    last = {name: name.rpartition(".")[2] for name in linear}
    if targets == "all-linear":
        # Routers decide which expert works; an adapter there unbalances the experts.
        chosen = [name for name in usable if not _is_router(modules, name)]
    else:
        for target in targets:
            there = [name for name in linear if target in (name, last[name])]
            if not there:
                raise ValueError(
                    f"lora_targets names {target!r}, which is no linear layer of the body of "
                    f"{type(model).__name__}. {did_you_mean(target, set(last.values()))}"
                )
            if not any(name in usable for name in there):
                raise ValueError(
                    f"lora_targets names {target!r}, which a {model.config.model_type} model does not call but reads "
                    "the weights of, so that an adapter there would do nothing. "
                    f"{did_you_mean(target, {last[name] for name in usable})}"
                )
        chosen = [name for name in usable if {name, last[name]} & set(targets)]
    if not chosen:
        raise ValueError(
            f"lora_targets={targets!r} leaves no linear layer of {type(model).__name__} to adapt"
        )
    suffixes = {last[name] for name in chosen}
    reached = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in suffixes}
    names = sorted(suffixes) if reached == set(chosen) else chosen
    return names, any(isinstance(linear[name], Conv1D) for name in chosen)


#: Layers whose weights these models hand to a kernel instead of calling the layer; the first two are on peft's list.
_READ_BY_KERNELS = {
    "out_proj": {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"},
    "conv1d": {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"},
    "dt_proj": {"falcon_mamba", "jamba", "mamba", "zamba"},
}


def _cannot_adapt(model: PreTrainedModel, name: str) -> bool:
    """Whether an adapter around a layer would do nothing, because the layer is not called."""
    return model.config.model_type in _READ_BY_KERNELS.get(name.rpartition(".")[2], ())


def _is_router(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether a linear layer stands directly beside the experts of a mixture."""
    return any(child.endswith("experts") for child, _ in modules[name.rpartition(".")[0]].named_children())


def adapted_weights(model: nn.Module, exact: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The weights of the adapted layers with the adapter added, by their names in the plain model.

    Args:
        model: With adapters.
        exact: In float32 and not in the precision of the weights under the adapter.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight
            delta = layer.get_delta_weight("default").float()
            yield f"{name}.weight", (weight.float() + delta).to(torch.float32 if exact else weight.dtype)


def save_adapter(model: nn.Module, folder: Path, learned: Collection[str] | None = None) -> None:
    """Write what is trained beside the weights (adapters, and a head of their own) as the folder of a peft adapter.

    Args:
        model: With the adapter.
        folder: Where.
        learned: Names of what is trained; None is what takes a gradient.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config["default"].save_pretrained(str(folder))
    weights = {
        f"base_model.model.{name.replace('.default.weight', '.weight')}": p.detach().cpu().contiguous()
        for name, p in model.named_parameters()
        if (p.requires_grad if learned is None else name in learned)
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


class LoraLM(CausalLM):
    """A :class:`~textrl_env.lm.causal_lm.CausalLM` that is another one plus an adapter.

    Args:
        reference: The model without the adapter; its weights are shared and never written.
        rank: As for :func:`add_adapter`.
        alpha: As for :func:`add_adapter`.
        targets: As for :func:`add_adapter`.

    Attributes:
        model: The transformers model with the adapter in it; nothing else in it takes a gradient.
        reference: See above.
    """

    def __init__(
        self,
        reference: CausalLM,
        rank: int,
        alpha: float | None = None,
        targets: str | Sequence[str] = "all-linear",
    ) -> None:
        # Tokenizer, end tokens, temperature, and what has been measured: all as the reference has it.
        vars(self).update(vars(reference))
        self.reference = reference
        self._settings = (rank, alpha, targets)
        self.alpha = 2 * rank if alpha is None else alpha
        self.model = add_adapter(reference.model, *self._settings)
        # By name: a copy that only writes responses has no gradients.
        self._learned = frozenset(name for name, p in self.model.named_parameters() if p.requires_grad)
        self._bfloat16 = None
        self._merged: PreTrainedModel | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether the weights under the adapter are no plain numbers, so that it cannot be merged into them."""
        return bool(getattr(self.reference.model, "is_quantized", False))

    def clone(self) -> LoraLM:
        """A copy with adapters of its own over the same weights."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model, _shared(self.model, lambda p: not p.requires_grad))
        twin._bfloat16 = twin._merged = None
        return twin

    def another_body(self) -> PreTrainedModel:
        """A second body over the same weights with an adapter of its own, a critic's for example."""
        return add_adapter(self.reference.model, *self._settings).base_model

    @torch.no_grad()
    def for_decoding(self) -> CausalLM:
        """What to decode with: itself, or under autocast the bfloat16 copy with the adapter merged into it."""
        if not self.autocast or self.model.dtype != torch.float32 or self.is_quantized:
            return self
        if self._bfloat16 is None:
            self._bfloat16 = self.reference.in_bfloat16()
            self._bfloat16.model.to(self.device)
        for name, weight in adapted_weights(self.model):
            self._bfloat16.model.get_parameter(name).copy_(weight)
        return self._bfloat16

    @torch.no_grad()
    def plain_model(self) -> PreTrainedModel:
        # A copy of all weights, made once: only an outside generator needs it.
        if self._merged is None:
            self._merged = copy.deepcopy(self.reference.model)
        merged = dict(self._merged.named_parameters())
        for name, weight in adapted_weights(self.model):
            merged[name].copy_(weight)
        return self._merged

    @torch.no_grad()
    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the merged model as an ordinary Hugging Face folder, and the adapter alone into ``adapter/``.

        Writing takes a merged copy of the adapted layers in the CPU's memory; this model stays as it is. Over quantised
        weights, which it cannot be merged into, the folder is the adapter's.

        Args:
            folder: Where.
            dtype: What numbers are written in; None is what they are under the adapter.
        """
        if self.is_quantized:
            save_adapter(self.model, Path(folder), self._learned)
            self.tokenizer.save_pretrained(str(folder))
            return
        merged = {name: weight.cpu() for name, weight in adapted_weights(self.model, exact=True)}
        plain = self.reference.model
        save_model(plain, folder, dtype, plain.state_dict() | merged)
        self.tokenizer.save_pretrained(str(folder))
        save_adapter(self.model, Path(folder) / "adapter", self._learned)

    @torch.no_grad()
    def take_out_of_base(self) -> None:
        """Subtract the adapter from weights that had it merged into them, to within rounding."""
        for _, layer in self._layers():
            weight = layer.get_base_layer().weight
            weight.sub_(layer.get_delta_weight("default").to(weight.dtype))

    @torch.no_grad()
    def base_digest(self) -> str:
        """A fingerprint of the weights under the adapter."""
        return digest_of_weights(self.reference.model.state_dict())

    def _layers(self) -> Iterator[tuple[str, Any]]:
        from peft.tuners.lora import LoraLayer

        return ((n, layer) for n, layer in self.model.named_modules() if isinstance(layer, LoraLayer))
