"""Models of transformers from a folder, the hub, or the folder of a peft adapter; the same options everywhere.

What cannot be used is refused here as what it is: an encoder-decoder, an encoder, a model without the head that is
needed. Code that comes with a model runs only where ``trust_remote_code`` allows it.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from reward_models.names import did_you_mean

ADAPTER = "adapter_config.json"
#: Precisions by name; "auto" is what the model came in.
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadOptions:
    """How ``from_pretrained`` loads a model.

    Args:
        dtype: Of the weights: float32, bfloat16, float16, or auto for what the folder holds.
        attn_implementation: eager, sdpa, flash_attention_2, ...; None is transformers' choice.
        device_map: As transformers has it (auto spreads a model over several devices); None puts the model on one.
        trust_remote_code: Whether code that comes with the model may run.
        revision: Branch, tag or commit of a hub id.
        load_in_4bit: Frozen weights in four bits, to train adapters over (QLoRA); needs bitsandbytes or torchao.
    """

    dtype: str | torch.dtype = "float32"
    attn_implementation: str | None = None
    device_map: str | Mapping[str, Any] | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    load_in_4bit: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.dtype, str) and self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not known. {did_you_mean(self.dtype, DTYPES)}")

    @property
    def source(self) -> dict[str, Any]:
        """The options that say where from, which tokenizers and configurations take too."""
        revision = {} if self.revision is None else {"revision": self.revision}
        return {"trust_remote_code": self.trust_remote_code} | revision

    def check_live(self) -> None:
        """Raise a ValueError for options beside a live model, which has been loaded already."""
        given = [f"{x.name}={getattr(self, x.name)!r}" for x in fields(LoadOptions) if self._asks(x)]
        if given:
            raise ValueError(
                f"{', '.join(given)} says how a model is loaded from a folder or the hub, but a live model was given; "
                "load it that way"
            )

    def _asks(self, option: Field) -> bool:
        value = getattr(self, option.name)
        return value != option.default and (option.name, value) != ("dtype", "auto")

    def keywords(self) -> dict[str, Any]:
        """What ``from_pretrained`` of a model is called with."""
        dtype = self.dtype
        found: dict[str, Any] = {"dtype": getattr(torch, dtype) if dtype in DTYPES[1:] else dtype}
        if self.attn_implementation is not None:
            found["attn_implementation"] = self.attn_implementation
        if self.device_map is not None:
            found["device_map"] = self.device_map
        if self.load_in_4bit:
            found["quantization_config"] = _four_bits()
        return found | self.source


def _four_bits() -> Any:
    if importlib.util.find_spec("bitsandbytes"):
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if importlib.util.find_spec("torchao"):
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup
        from transformers import TorchAoConfig

        # Its packed kernels need more packages and have no gradients; this has, and keeps the four bits in a byte.
        return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    raise ImportError(
        "load_in_4bit needs bitsandbytes or torchao, of which neither is installed: pip install bitsandbytes"
    )


def load_causal_lm(
    path: str | Path, options: LoadOptions | None = None, device: torch.device | None = None
) -> PreTrainedModel:
    """A causal language model; an adapter's folder gives the model under it with the adapter merged in.

    Args:
        path: Folder or hub id.
        options: See :class:`LoadOptions`.
        device: Where to put the model, unless ``device_map`` says; None leaves it on the CPU.

    Raises:
        FileNotFoundError: Nothing there that can be read.
        ValueError: It is no decoder with a language-model head.
    """
    options = options or LoadOptions()
    base = adapter_base(path)
    if base is not None:
        return _merged(path, base, options, device)
    check_model_path(path)
    try:
        config = AutoConfig.from_pretrained(str(path), **options.source)
        check_decoder(config, f"model={str(path)!r}")
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path), config=config, output_loading_info=True, **options.keywords()
        )
    except OSError as error:
        raise FileNotFoundError(_not_found(path, error)) from error
    if info["missing_keys"]:
        raise ValueError(
            f"model={str(path)!r} is no whole language model: {sorted(info['missing_keys'])[:4]} are not in it and "
            f"would be random (it was saved as {(config.architectures or ['?'])[0]})"
        )
    return place(model, device, options)


def place(model: PreTrainedModel, device: torch.device | None, options: LoadOptions) -> PreTrainedModel:
    """The model on a device, unless its device map or its four bits have placed it."""
    if options.device_map is not None or options.load_in_4bit:
        return model
    own_memory(model)
    return model if device is None else model.to(device)


def own_memory(model: PreTrainedModel) -> None:
    """Moves weights that are mapped from a file to memory of their own, aligned as torch aligns it.

    Matrix products of equal numbers can differ in the last bit by where these lie, and a policy that is a copy of its
    reference would not be equal to it.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


@torch.no_grad()
def save_model(
    model: PreTrainedModel,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a model as an ordinary Hugging Face folder.

    Args:
        model: The model; it stays as it is.
        folder: Where.
        dtype: What its numbers are written in; None is what they are.
        weights: By name, in place of its own.
    """
    if weights is None and dtype in (None, model.dtype):
        model.save_pretrained(str(folder))
        return
    weights = model.state_dict() if weights is None else weights
    dtype = model.dtype if dtype is None else dtype
    weights = {n: w.to(dtype) if w.is_floating_point() else w for n, w in weights.items()}
    model.save_pretrained(str(folder), state_dict=weights)
    file = Path(folder) / "config.json"  # names the precision of the live model, not that of the file
    config = json.loads(file.read_text(encoding="utf-8")) | {"dtype": str(dtype).removeprefix("torch.")}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(path: str | Path, options: LoadOptions | None = None) -> Any:
    """The tokenizer beside a model; that of the model under it where an adapter's folder holds none."""
    base = adapter_base(path)
    if base is not None and not (Path(path).expanduser() / "tokenizer_config.json").is_file():
        path = base
    return AutoTokenizer.from_pretrained(str(path), **(options or LoadOptions()).source)


def check_decoder(config: Any, what: str = "model", encoders: bool = False) -> None:
    """Raise a ValueError for the configuration of a model that does not write from left to right.

    Args:
        config: Of transformers.
        what: What the error calls the model.
        encoders: Whether encoders will do as well, which can score a text.
    """
    written = (config.architectures or ["?"])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{what} is an encoder-decoder ({config.model_type}); this project trains decoder-only language models, "
            "for which prompt and response are one sequence"
        )
    if not encoders and written.endswith("ForMaskedLM") and not getattr(config, "is_decoder", False):
        raise ValueError(
            f"{what} is an encoder ({written}) that fills gaps and reads text from both sides; expected a causal "
            "language model"
        )


# -- adapters -----------------------------------------------------------------------------------------------


def adapter_base(path: str | Path) -> str | None:
    """The model that a peft adapter's folder was trained over, or None if the folder is no adapter's.

    Raises:
        ValueError: The adapter does not name its model, or is no LoRA-like one that can be merged.
    """
    file = Path(path).expanduser() / ADAPTER
    if not file.is_file() or (file.parent / "config.json").is_file():
        return None
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{file} does not name the model that the adapter is for (base_model_name_or_path)")
    beside = file.parent / base
    return str(beside) if not Path(base).is_absolute() and (beside / "config.json").is_file() else base


def _merged(
    path: str | Path, base: str, options: LoadOptions, device: torch.device | None
) -> PreTrainedModel:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError(
            f"{str(path)!r} is the folder of an adapter, which needs peft: pip install 'textrl-env[lora]'"
        ) from error
    if options.load_in_4bit:
        raise ValueError(
            f"{str(path)!r} is an adapter, which cannot be merged into weights of four bits; load it without "
            "load_in_4bit, or merge it first"
        )
    try:
        model = load_causal_lm(base, replace(options, revision=None), device)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{str(path)!r} is an adapter over {base!r}, which is not to be had: {error}"
        ) from error
    adapted = PeftModel.from_pretrained(model, str(path))
    if not hasattr(adapted, "merge_and_unload"):
        kind = adapted.active_peft_config.peft_type
        raise ValueError(
            f"{str(path)!r} is an adapter of the type {kind}, which cannot be merged into its model"
        )
    merged = adapted.merge_and_unload().requires_grad_(True)
    merged.name_or_path = merged.config._name_or_path = str(path)
    return merged


# -- paths --------------------------------------------------------------------------------------------------


def check_model_path(path: str | Path, what: str = "model") -> None:
    """Raise a FileNotFoundError for something that is meant as a folder and is not a model folder.

    ``"name"`` and ``"owner/name"`` are left to the hub unless ``owner`` is a folder here.
    """
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file() or (folder / ADAPTER).is_file():
        return
    if folder.is_dir():
        held = sorted(p.name for p in folder.iterdir())[:8]
        raise FileNotFoundError(
            f"{what}={str(path)!r} is a folder without config.json, not a Hugging Face model; it holds {held}"
        )
    has_parent = folder.parent != Path() and folder.parent.is_dir()
    if has_parent or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(path)):
        siblings = [p.name for p in folder.parent.iterdir()] if has_parent else []
        close = difflib.get_close_matches(folder.name, siblings, n=1)
        hint = f" Did you mean {str(folder.parent / close[0])!r}?" if close else ""
        raise FileNotFoundError(f"{what}={str(path)!r}: there is no such folder.{hint}")


def _not_found(path: str | Path, error: OSError) -> str:
    """What to tell about a model that neither a folder nor the hub gave."""
    if (Path(path).expanduser() / "config.json").is_file():
        return f"model={str(path)!r} is a folder with a config.json, but the model cannot be read from it: {error}"
    folders = [p.parent.name for p in Path().glob("*/config.json")]
    close = difflib.get_close_matches(str(path), folders, n=1)
    hint = f" Did you mean the folder {close[0]!r}?" if close else ""
    return (
        f"model={str(path)!r}: no such folder here, and the hub gave none: {str(error).splitlines()[0]}{hint}"
    )
