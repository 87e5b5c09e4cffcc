"""The model that a trainer on files trains: loaded or live, whole or under an adapter, saved as what it was.

What learns is kept in float32, since steps of 1e-6 are lost in bfloat16 weights; a model that came in bfloat16 is
saved in bfloat16 again. Under an adapter the weights stay as they were loaded, in four bits if so wished.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from agents.offline.options import TrainerOptions
from agents.offline.rounding import RoundingCheck
from agents.policies.lora import adapted_weights, add_adapter, digest_of_weights, save_adapter
from agents.runs.whole import write_folder
from reward_models.loading import (
    LoadOptions,
    adapter_base,
    load_causal_lm,
    load_tokenizer,
    place,
    save_model,
)
from textrl_env.lm import checkpointing
from textrl_env.lm.causal_lm import choose_device
from textrl_env.lm.precision import bfloat16_products

_HALF = (torch.bfloat16, torch.float16)


class Learner:
    """A model in training.

    Args:
        model: Folder, hub id, or a live model, which is trained in place.
        tokenizer: None takes the one that lies beside the model.
        device: ``"auto"`` or any torch device.
        options: How to load and adapt it.
        load: Loads another kind of model than a causal LM: ``(path, options, device) -> model``.
        head: Finds a module that is trained beside an adapter (a score head).
        seed: Of the adapters' first values.

    Attributes:
        model: What computes and is trained, adapters in place.
        plain: The model without adapters; ``model`` itself where there are none.
        tokenizer: Its tokenizer.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: str | Path | PreTrainedTokenizerBase | None,
        device: str | torch.device,
        options: TrainerOptions,
        load: Callable[[str | Path, LoadOptions, torch.device], PreTrainedModel] = load_causal_lm,
        head: Callable[[PreTrainedModel], torch.nn.Module] | None = None,
        seed: int = 0,
    ) -> None:
        loading = options.loading
        self.is_live = not isinstance(model, (str, Path))
        if isinstance(model, (str, Path)):
            tokenizer = model if tokenizer is None else tokenizer
            saved = _dtype_in_folder(model, loading)
            model = load(model, loading, choose_device(device))
        else:
            loading.check_live()
            saved = model.dtype
            model = place(model, choose_device(device), loading)
        if tokenizer is None:
            raise ValueError("a live model needs its tokenizer: pass tokenizer=...")
        if isinstance(tokenizer, (str, Path)):
            tokenizer = load_tokenizer(tokenizer, loading)
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no EOS token, so the model could not learn to stop; set eos_token"
            )
        saved = saved if options.save_dtype == "auto" else getattr(torch, options.save_dtype)
        self.tokenizer, self.plain, self.saved_dtype = tokenizer, model, saved
        self.is_quantized = bool(getattr(model, "is_quantized", False))
        half = model.dtype in _HALF
        self.model = model
        if options.lora_rank is not None:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.model = add_adapter(model, options.lora_rank, options.lora_alpha, options.lora_targets)
            if head is not None:
                head(self.model).float().requires_grad_(True)
        else:
            if half:
                model.float()
            if not any(p.requires_grad for p in model.parameters()):
                model.requires_grad_(True)
        self.has_adapter = options.lora_rank is not None
        on_cuda = self.model.device.type == "cuda"
        self.autocast = (half or on_cuda) if options.autocast is None else options.autocast
        self.checkpointing = options.gradient_checkpointing
        rounds = saved in _HALF and not self.is_quantized
        self._rounding = RoundingCheck(self._exact(), saved) if rounds else None

    @torch.no_grad()
    def _exact(self) -> Iterator[tuple[str, Tensor]]:
        """What is trained of the model's weights, by name, in float32."""
        return adapted_weights(self.model, exact=True) if self.has_adapter else iter(self.parameters())

    @torch.no_grad()
    def warn_of_rounding(self) -> None:
        """Warn where most of what was learned is less than the precision that the model is saved in."""
        lost = 0.0 if self._rounding is None else self._rounding.lost(self._exact())
        if lost > 0.5:
            dtype = str(self.saved_dtype).removeprefix("torch.")
            warnings.warn(
                f"{lost:.0%} of the weights that have moved are the same again in {dtype}, in which the model is "
                "saved, so small were the steps; save it in float32 (save_dtype='float32'), or take a larger "
                "learning_rate",
                stacklevel=2,
            )

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """What is trained, by name."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def digest_of_frozen(self) -> str | None:
        """A text that tells the weights under an adapter from others; None where every weight is trained."""
        frozen = {name: p for name, p in self.model.named_parameters() if not p.requires_grad}
        return digest_of_weights(frozen)[:12] if frozen else None

    def precision(self) -> AbstractContextManager[None]:
        """The context in which the model computes."""
        return bfloat16_products(self.model.device, self.autocast)

    def saving_memory(self) -> AbstractContextManager[None]:
        """The context in which layers forget their activations, where gradient checkpointing is on."""
        return checkpointing.recomputed(self.model, self.checkpointing)

    def save(self, folder: str | Path) -> None:
        """Write an ordinary Hugging Face folder in the precision that the model came in, adapters merged.

        The adapter alone goes into ``adapter/``; over weights of four bits, which it cannot be merged into, the
        folder is the adapter's. Files are put into their places when all are written.

        Raises:
            OSError: They cannot be written; what was there before is whole.
        """
        write_folder(Path(folder), self.write_files)

    @torch.no_grad()
    def write_files(self, folder: Path) -> None:
        """:meth:`save` into an empty folder."""
        if self.is_quantized:
            save_adapter(self.model, folder)
        else:
            self._save_whole(folder, self.saved_dtype)
            if self.has_adapter:
                save_adapter(self.model, folder / "adapter")
        self.tokenizer.save_pretrained(str(folder))

    def _save_whole(self, folder: Path, dtype: torch.dtype) -> None:
        weights: dict[str, Tensor] = self.plain.state_dict()
        if self.has_adapter:
            weights |= {name: weight.cpu() for name, weight in adapted_weights(self.model)}
            weights |= {name: p.detach() for name, p in self.parameters() if name in weights}
        save_model(self.plain, folder, dtype, weights)

    @torch.no_grad()
    def finish(self) -> None:
        """Leave a live model trained, in its own precision: an adapter becomes part of its weights."""
        self.model.eval()
        if not self.is_live:
            return
        if self.has_adapter and not self.is_quantized:
            own = self.plain.state_dict()
            for name, weight in adapted_weights(self.model):
                own[name].copy_(weight)
            for name, parameter in self.parameters():
                if name in own:
                    own[name].copy_(parameter)
        if self.plain.dtype != self.saved_dtype and not self.is_quantized:
            self.plain.to(self.saved_dtype)


def _dtype_in_folder(path: str | Path, loading: LoadOptions) -> torch.dtype:
    """The precision that a model lies in."""
    base = adapter_base(path)
    try:
        config = AutoConfig.from_pretrained(str(path if base is None else base), **loading.source)
    except (OSError, ValueError):
        return torch.float32  # loading it will tell what is wrong
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
