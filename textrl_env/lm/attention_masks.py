"""Who may look at whom, in the form that a model takes it in.

Layers see everything before a token, a window of it, or the chunk that it is in; a model takes one mask for all layers,
one for each type of layer, or only the padding, from which it makes its own. :class:`AttentionMasks` reads the first
from the configuration; the second is tried out (:mod:`~textrl_env.lm.self_check`), never guessed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: One mask, one for each type of layer, or the padding alone.
ONE, BY_LAYER_TYPE, PADDING = "one mask", "masks by type of layer", "padding only"
_WIDTHS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


class Limit(NamedTuple):
    """How far a layer sees: ``width`` tokens back from each, or the chunk of ``width`` tokens that it is in."""

    layer_type: str
    width: int


class AttentionMasks:
    """The masks of one model.

    Args:
        config: Its configuration.
        form: How it takes masks: :data:`ONE`, :data:`BY_LAYER_TYPE` or :data:`PADDING`.
    """

    def __init__(self, config: Any, form: str = ONE) -> None:
        self.config, self.form = config.get_text_config(), form

    @property
    def limits(self) -> dict[str, Limit | None]:
        """How far the layers of each type see; None is everything before them."""
        widths = {t: getattr(self.config, name, None) for t, name in _WIDTHS.items()}
        bounded = {t: Limit(t, width) for t, width in widths.items() if isinstance(width, int)}
        types = getattr(self.config, "layer_types", None)
        if types:
            return {t: bounded.get(t) for t in dict.fromkeys(types)}
        return {"full_attention": next(iter(bounded.values()), None)}

    def forms(self) -> list[str]:
        """The forms worth trying, the likeliest first."""
        several = [BY_LAYER_TYPE] if getattr(self.config, "layer_types", None) else []
        return [*several, ONE, PADDING]

    def limited(self, length: int) -> bool:
        """Whether some layer does not see all of a sequence of ``length`` tokens."""
        return any(limit is not None and limit.width < length for limit in self.limits.values())

    def uniform(self, length: int) -> bool:
        """Whether all layers see the same of a sequence of ``length`` tokens."""
        return not self.limited(length) or len(set(self.limits.values())) == 1

    def one(self, visible: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """Bool ``[R or 1, 1, Q, K]`` for all layers alike; arguments as of :meth:`make`."""
        return _within(visible, queries, keys, next(iter(self.limits.values())))[:, None]

    def make(
        self, visible: Tensor, queries: Tensor, keys: Tensor, dtype: torch.dtype
    ) -> Tensor | dict[str, Tensor]:
        """What a model's modules take as ``attention_mask``.

        Args:
            visible: bool ``[R or 1, Q, K]``, what a layer that sees everything may look at.
            queries: Positions of the queries, int64 ``[R or 1, Q]``.
            keys: Positions of the keys, int64 ``[R or 1, K]``.
            dtype: Of the scores.
        """
        masks = {
            t: self._formatted(_within(visible, queries, keys, x), dtype) for t, x in self.limits.items()
        }
        return masks if self.form == BY_LAYER_TYPE else next(iter(masks.values()))

    def _formatted(self, visible: Tensor, dtype: torch.dtype) -> Tensor:
        """``[R, 1, Q, K]``, bool, or what is added to the scores where a model's own code does attention."""
        mask = visible[:, None]
        if getattr(self.config, "_attn_implementation", None) != "eager":
            return mask
        # The lowest number and not minus infinity, as transformers has it: a row that sees nothing stays finite.
        lowest = torch.finfo(dtype).min
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)


def _within(visible: Tensor, queries: Tensor, keys: Tensor, limit: Limit | None) -> Tensor:
    if limit is None:
        return visible
    if limit.layer_type == "chunked_attention":
        chunks = queries[:, :, None] // limit.width, keys[:, None] // limit.width
        return visible & (chunks[0] == chunks[1])
    return visible & (keys[:, None] > queries[:, :, None] - limit.width)


@contextlib.contextmanager
def narrowed_windows(config: Any, width: int) -> Iterator[None]:
    """Windows and chunks of at most ``width`` tokens for a while, so that short sequences reach over their edges."""
    config = config.get_text_config()
    before = {name: getattr(config, name, None) for name in _WIDTHS.values()}
    before = {name: value for name, value in before.items() if isinstance(value, int) and value > width}
    try:
        for name in before:
            setattr(config, name, width)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
