"""Warnings, in the way Gymnasium shows them."""

from __future__ import annotations

from gymnasium import logger


def warn(message: str) -> None:
    """Warn with Gymnasium's colour and level; a percent sign in the message is one.

    Gymnasium formats a message with ``%``, and the names, texts and shares in ours may hold that sign.
    """
    logger.warn("%s", message, stacklevel=2)
