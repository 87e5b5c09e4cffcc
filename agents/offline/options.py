"""What every trainer on files can do beside its own method: load, adapt, schedule, watch, save, go on.

:func:`agents.offline.sft.sft`, :func:`agents.offline.dpo.dpo` and
:func:`agents.offline.reward_model.train_reward_model` take the fields of :class:`TrainerOptions` as keywords, and the
verbs of the command line as flags. They are written down here once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from agents.runs.logs import check_reports, report_names
from agents.runs.saving import parse_save_every
from reward_models.loading import DTYPES, LoadOptions
from textrl_env.errors import check_choice, check_keywords, check_range


@dataclass(frozen=True)
class TrainerOptions(LoadOptions):
    """Options that all trainers on files share, beside those of loading: :class:`reward_models.loading.LoadOptions`.

    What is trained is kept in float32, whatever ``dtype`` it is loaded in.

    Args:
        lr_scheduler_type: How the learning rate goes, by transformers' names: cosine, linear, constant, ...
        lr_scheduler_kwargs: More arguments of the schedule, for example {"min_lr_rate": 0.1}.
        lora_rank: Train LoRA adapters of this rank and leave the weights alone; None trains every weight.
        lora_alpha: Scales the adapters by lora_alpha / lora_rank; None is 2 * lora_rank.
        lora_targets: Names of the linear layers that get adapters, or "all-linear" for all of the body's.
        autocast: Matrix products in bfloat16; None is where CUDA is, or where the weights came in half precision.
        gradient_checkpointing: Compute a layer's activations again in the backward pass instead of keeping them.
        save_dtype: What numbers are written in: float32, bfloat16, float16, or auto for what the model came in.
        eval_every: Optimiser steps between two looks at the held-out records; None looks at the end only.
        save_every: Optimiser steps (500), a time (90s, 15m, 2h) or both (500,15m) between checkpoints in the output
            folder, from which a run can go on; None saves none.
        keep: Checkpoints to keep, the latest ones.
        resume: Go on from the latest checkpoint in the output folder, if there is one.
        report_to: Where the log goes: csv, tensorboard, wandb, trackio, several with commas between, or none.
        log_dir: Folder of the log; None is logs/ in the output folder.
    """

    lr_scheduler_type: str = "cosine"
    lr_scheduler_kwargs: Mapping[str, Any] | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: str | Sequence[str] = "all-linear"
    autocast: bool | None = None
    gradient_checkpointing: bool = False
    save_dtype: str = "auto"
    eval_every: int | None = None
    save_every: int | str | None = None
    keep: int = 2
    resume: bool = False
    report_to: str | Sequence[str] = "none"
    log_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("save_dtype", self.save_dtype, DTYPES)
        if self.save_every is not None:
            parse_save_every(self.save_every)
        check_range(1, lora_rank=self.lora_rank, eval_every=self.eval_every, keep=self.keep)
        check_reports(self.reports)
        if self.lora_rank is None:
            alone = [
                name
                for name in ("lora_alpha", "lora_targets")
                if getattr(self, name) not in (None, "all-linear")
            ]
            if alone:
                raise ValueError(f"{' and '.join(alone)} go with lora_rank, which is None")
            if self.load_in_4bit:
                raise ValueError(
                    "weights of four bits cannot be trained, only adapters over them: give lora_rank too"
                )

    @classmethod
    def of(cls, owner: str, options: Mapping[str, Any]) -> TrainerOptions:
        """The options of a call, or a TypeError that names the nearest to one that there is not."""
        check_keywords(owner, cls, options)
        return cls(**options)

    @property
    def reports(self) -> list[str]:
        """The names in ``report_to``."""
        return report_names(self.report_to)

    @property
    def loading(self) -> LoadOptions:
        """The options that say how a model is loaded."""
        return LoadOptions(**{option.name: getattr(self, option.name) for option in fields(LoadOptions)})
