"""A page that shows what fine-tuning has taught: every token of some records, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import TensorBoardOutputFormat

from agents.evaluation.token_heatmap import heatmap_html, score_tokens
from agents.evaluation.token_heatmap_image import heatmap_image
from reward_models.data.encoding import TextEncoder

_TITLE = "What fine-tuning has taught: how sure the model is of every token"


class TokenPage(BaseCallback):
    """Scores the tokens of some records before and after training, for a page and for TensorBoard.

    Args:
        file: The page.
        records: Of any form that :func:`agents.offline.sft.encode_demonstration` takes.
        max_length: As in training.
        chat_template_kwargs: As in training.
        allow_control_tokens: As in training.

    Attributes:
        written: Whether there was something to show.
    """

    def __init__(
        self,
        file: Path,
        records: Sequence[dict[str, Any]],
        max_length: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_control_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.template_settings = (chat_template_kwargs, allow_control_tokens)
        self.file, self.records, self.max_length = file, records, max_length
        self.written = False

    def _score(self) -> Any:
        encoder = TextEncoder(self.model.tokenizer, *self.template_settings)
        return score_tokens(self.model.policy, encoder, self.records, self.max_length)

    def _on_training_start(self) -> None:
        self._before = self._score()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        if not self._before:
            return
        scored = {"before": self._before, "after": self._score()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(heatmap_html(scored, _TITLE), encoding="utf-8")
        self.written = True
        for output in self.logger.output_formats:
            if isinstance(output, TensorBoardOutputFormat):  # the CSV would get an empty row
                image = heatmap_image(scored, _TITLE)
                output.writer.add_image("samples/tokens", image, self.num_timesteps, dataformats="HWC")
