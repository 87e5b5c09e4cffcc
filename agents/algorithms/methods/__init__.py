"""Methods, a file each, and the one table that names them.

A method is a class in a file of this package and an entry in :data:`METHODS`. By its entry it is exported by
:mod:`agents`, a name for ``--agent``, a row of the gradient table (``benchmarks/gradients.py``) and of
``docs/methods.md``. Importing this package loads no torch.

A class changes the two or three pieces that its paper changes and inherits the rest. The KL is the environment's
(``kl_coef``) and counted once, also for methods whose papers have none: make the environment with ``kl_coef=0`` to
train as published there. Left out everywhere: the papers' schedules, data sets and filters of prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

#: What a method changes, in the order of the docs.
FAMILIES: dict[str, str] = {
    "base": "the three that the others start from",
    "advantage": "what an action is credited with",
    "ratio": "importance ratios, clips and the averaging",
    "critic": "values that are learned, and what they are for",
    "mask": "which tokens count, and entropy",
    "teacher": "learning from another model, or from answers that were right",
}
#: What theory says of a first gradient step, in expectation.
EXPECTATIONS: dict[str, str] = {
    "unbiased": "the gradient of the objective",
    "rescaled": "its direction, another length",
    "nearly": "its direction, but for a bias that fades as groups grow, or as a critic learns",
    "biased": "another direction",
}


@dataclasses.dataclass(frozen=True)
class Method:
    """How a method is known to the package, the command line, the gradient table and the docs.

    Attributes:
        name: On the command line.
        path: ``"module:Class"``, where it is.
        family: What it changes, one of :data:`FAMILIES`.
        paper: arXiv id; "" where there is none.
        changes: What it changes, in a line.
        expects: Of its first step against the gradient of ``E[score] - kl_coef * KL``, one of :data:`EXPECTATIONS`.
        climbs: What its first step is the gradient of, where that is another objective; "" where it is none.
        settings: Arguments of the class in the gradient table.
        text_only: Whether it needs a language model, and so is no row of the gradient table.
    """

    name: str
    path: str
    family: str
    paper: str
    changes: str
    expects: str
    climbs: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text_only: bool = False

    @property
    def module(self) -> str:
        """Where the class is defined."""
        return self.path.partition(":")[0]

    @property
    def class_name(self) -> str:
        """The class, also its name in :mod:`agents`."""
        return self.path.partition(":")[2]


_HERE = __name__
_ROOM = __name__.rpartition(".")[0]

METHODS: tuple[Method, ...] = (
    # -- base ------------------------------------------------------------------------------------------------
    Method(
        "reinforce",
        f"{_ROOM}.reinforce:REINFORCE",
        "base",
        "",
        "reward-to-go less the mean of the other episodes (Williams 1992)",
        "unbiased",
        settings={"gamma": 1.0},
    ),
    Method(
        "ppo",
        f"{_ROOM}.ppo:PPO",
        "base",
        "1707.06347",
        "a critic's generalised advantage estimate, a clipped ratio",
        "nearly",
        settings={"gamma": 1.0, "batch_size": None},
    ),
    Method(
        "grpo",
        f"{_ROOM}.grpo:GRPO",
        "base",
        "2402.03300",
        "scores relative to a group's, over its standard deviation; mean over each response",
        "biased",
    ),
    # -- advantage -------------------------------------------------------------------------------------------
    Method(
        "rloo",
        f"{_HERE}.rloo:RLOO",
        "advantage",
        "2402.14740",
        "the mean of the group's others as the baseline; the response is one action",
        "unbiased",
    ),
    Method(
        "reinforce++",
        f"{_HERE}.reinforce_plus_plus:REINFORCEPlusPlus",
        "advantage",
        "2501.03262",
        "reward-to-go, normalised over all tokens of the batch; no groups",
        "rescaled",
    ),
    Method(
        "dr-grpo",
        f"{_HERE}.dr_grpo:DrGRPO",
        "advantage",
        "2503.20783",
        "no division by the standard deviation nor by a response's own length",
        "rescaled",
    ),
    Method(
        "gigpo",
        f"{_HERE}.gigpo:GiGPO",
        "advantage",
        "2505.10978",
        "GRPO plus credit for single turns, among turns that answer the same state",
        "biased",
    ),
    Method(
        "process-grpo",
        f"{_HERE}.process_grpo:ProcessGRPO",
        "advantage",
        "2402.03300",
        "GRPO with a reward for each step of an answer, relative to those of all steps of the group",
        "biased",
    ),
    Method(
        "maxrl",
        f"{_HERE}.maxrl:MaxRL",
        "advantage",
        "2602.02710",
        "divided by the group's mean score, an estimate of how hard the prompt is",
        "biased",
        climbs="sum_{k < G} pass@k / k, which tends to log(pass rate)",
    ),
    Method(
        "pass-at-k",
        f"{_HERE}.pass_at_k:PassAtK",
        "advantage",
        "2505.15201",
        "credit for what an answer adds to the best of k",
        "biased",
        climbs="E[max of k scores], with right and wrong pass@k",
    ),
    Method(
        "opo",
        f"{_HERE}.opo:OPO",
        "advantage",
        "2505.23585",
        "a baseline weighted by length, for the least variance",
        "nearly",
    ),
    Method(
        "otb",
        f"{_HERE}.otb:OTB",
        "advantage",
        "2602.07078",
        "a baseline of each token's own, for the least variance",
        "nearly",
    ),
    Method(
        "gdpo",
        f"{_HERE}.gdpo:GDPO",
        "advantage",
        "2601.05242",
        "several rewards, each normalised before they are added",
        "biased",
    ),
    # -- ratio -----------------------------------------------------------------------------------------------
    Method(
        "dapo",
        f"{_HERE}.dapo:DAPO",
        "ratio",
        "2503.14476",
        "a higher upper clip, a mean over tokens, fresh groups for those that are all alike",
        "biased",
    ),
    Method(
        "gspo",
        f"{_HERE}.gspo:GSPO",
        "ratio",
        "2507.18071",
        "one length-normalised ratio for a response",
        "biased",
    ),
    Method(
        "cispo",
        f"{_HERE}.cispo:CISPO",
        "ratio",
        "2506.13585",
        "the weight is clipped and not the gradient",
        "biased",
    ),
    Method(
        "sapo",
        f"{_HERE}.sapo:SAPO",
        "ratio",
        "2511.20347",
        "a soft gate in place of the clip",
        "biased",
    ),
    Method(
        "dppo",
        f"{_HERE}.dppo:DPPO",
        "ratio",
        "2602.04879",
        "stops a token by how far its probability has moved, not by its ratio",
        "biased",
    ),
    Method(
        "gmpo",
        f"{_HERE}.gmpo:GMPO",
        "ratio",
        "2507.20673",
        "the geometric mean of a response's clipped ratios",
        "biased",
    ),
    Method(
        "luspo",
        f"{_HERE}.luspo:LUSPO",
        "ratio",
        "2602.05261",
        "GSPO with a response's loss times its length",
        "biased",
    ),
    Method(
        "vespo",
        f"{_HERE}.vespo:VESPO",
        "ratio",
        "2602.10693",
        "a smooth weight of the whole response's ratio",
        "biased",
    ),
    Method(
        "gpg",
        f"{_HERE}.gpg:GPG",
        "ratio",
        "2504.02546",
        "no ratio; scaled up for groups that are all alike",
        "rescaled",
    ),
    Method(
        "scale-rl",
        f"{_HERE}.scale_rl:ScaleRL",
        "ratio",
        "2510.13786",
        "CISPO with a mean over prompts, over the batch's standard deviation",
        "biased",
    ),
    # -- critic ----------------------------------------------------------------------------------------------
    Method(
        "vc-ppo",
        f"{_HERE}.vc_ppo:VCPPO",
        "critic",
        "2503.01491",
        "PPO whose critic learns whole returns, and alone at first",
        "nearly",
        settings={"gamma": 1.0, "batch_size": None, "critic_warmup": 0},
    ),
    Method(
        "vapo",
        f"{_HERE}.vapo:VAPO",
        "critic",
        "2504.05118",
        "a lambda for each length, clip-higher, the likelihood of right answers",
        "biased",
        settings={"gamma": 1.0, "batch_size": None, "critic_warmup": 0, "group_size": 8},
    ),
    # -- mask ------------------------------------------------------------------------------------------------
    Method(
        "clip-cov",
        f"{_HERE}.clip_cov:ClipCov",
        "mask",
        "2505.22617",
        "leaves out a few of the tokens that cost most entropy",
        "biased",
    ),
    Method(
        "kl-cov",
        f"{_HERE}.kl_cov:KLCov",
        "mask",
        "2505.22617",
        "holds the tokens that cost most entropy to the old policy; no clip",
        "biased",
    ),
    # -- teacher ---------------------------------------------------------------------------------------------
    Method(
        "raft",
        f"{_HERE}.raft:RAFT",
        "teacher",
        "2304.06767",
        "imitates the best of a group's answers",
        "biased",
    ),
    Method(
        "gkd",
        f"{_HERE}.gkd:GKD",
        "teacher",
        "2306.13649",
        "distillation from a teacher on the student's own answers",
        "biased",
        text_only=True,
    ),
    Method(
        "sdpo",
        f"{_HERE}.sdpo:SDPO",
        "teacher",
        "2601.20802",
        "distillation from oneself, shown a right answer of one's group or other feedback",
        "biased",
        text_only=True,
    ),
    Method(
        "ppo-ptx",
        f"{_ROOM}.ppo_ptx:PPOptx",
        "teacher",
        "2203.02155",
        "PPO with a share of supervised gradient in every step",
        "biased",
        text_only=True,
    ),
)


def exports() -> dict[str, str]:
    """Class name to the module that defines it, of every method."""
    return {method.class_name: method.module for method in METHODS}


def names() -> dict[str, str]:
    """Name on the command line to ``"agents:Class"``, as checkpoints write it."""
    return {method.name: f"agents:{method.class_name}" for method in METHODS}


def find_method(name: str) -> Method | None:
    """The entry of a name on the command line or of a class; None for what is not of the package."""
    return next((m for m in METHODS if name.lower() in (m.name, m.class_name.lower())), None)
