"""Our losses equal those of TRL's own trainers, on the same models and the same batch.

Needs TRL, which ``pip install 'textrl-env[test]'`` brings; skipped without it.
"""

from __future__ import annotations

import ast
import collections
import copy
import inspect
import textwrap
import types

import pytest
import torch

from agents import GRPO
from agents.algorithms.importance import importance_weights
from agents.offline.dpo import Objective
from agents.offline.preference_data import load_preferences
from agents.offline.ratio_losses import RATIO_LOSSES
from agents.offline.sft import accumulate_sft_gradients, encode_demonstration
from agents.policies.base import Evaluation
from agents.rollouts.rollout import Rollout
from reward_models.bradley_terry import bradley_terry_loss
from reward_models.calibration import forward_scores
from reward_models.comparisons import encode_answer
from tests.tiny import EOS, make_env, make_model, make_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

# TRL tokenizes prompt and completion as they stand, without the space between them; neither do we.
PAIRS = [
    {"prompt": "a ", "chosen": "b c", "rejected": "d"},
    {"prompt": "b c ", "chosen": "e", "rejected": "f g h"},
    {"prompt": "d e f ", "chosen": "a a", "rejected": "b"},
    {"prompt": "g ", "chosen": "c i", "rejected": "i i i i"},
]
JUDGED = [
    {"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
    for p, side in zip(PAIRS, ["chosen", "rejected", "chosen", "chosen"], strict=True)
]


def tiny(seed):
    return copy.deepcopy(make_model("llama", seed=seed))


def policy():
    return tiny(1)


def reference():
    return tiny(2)


def arguments(config, tmp_path, **kwargs):
    return config(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        **kwargs,
    )


def their_loss(trainer) -> tuple[float, torch.Tensor]:
    """The loss of the whole data set as one batch, and its gradient."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), gradient(trainer.model)


def gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.ravel() for p in model.parameters() if p.grad is not None])


def our_loss(loss, rows, **settings) -> tuple[float, torch.Tensor]:
    settings = {
        "beta": 0.3,
        "label_smoothing": 0.0,
        "gamma": 0.7,
        "desirable_weight": 1.5,
        "undesirable_weight": 0.5,
    } | settings
    items, _ = load_preferences(rows, make_tokenizer(), paired=loss != "kto")
    objective = Objective(loss=loss, pad_id=EOS, **settings)
    model = policy()
    known = objective.reference(reference(), items)
    return objective.backward(model, items, known, None)["loss"], gradient(model)


def assert_equal(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5, rel=1e-6)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "ipo", *RATIO_LOSSES])
def test_dpo_and_its_family_equal_trl(loss, tmp_path):
    smoothing = {"label_smoothing": 0.2} if loss in ("robust", "exo_pair") else {}
    trainer = trl.DPOTrainer(
        model=policy(),
        ref_model=reference(),
        args=arguments(trl.DPOConfig, tmp_path, loss_type=loss, beta=0.3, **smoothing),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=make_tokenizer(),
    )
    assert_equal(our_loss(loss, PAIRS, **smoothing), their_loss(trainer))


@pytest.mark.parametrize(("trained", "frozen"), [(1, 2), (2, 1)])
def test_kto_equals_trl_on_the_same_mismatched_pairs(trained, frozen, tmp_path):
    trainer = trl.KTOTrainer(
        model=tiny(trained),
        ref_model=tiny(frozen),
        args=arguments(trl.KTOConfig, tmp_path, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5),
        train_dataset=datasets.Dataset.from_list(JUDGED),
        processing_class=make_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    items, _ = load_preferences(JUDGED, make_tokenizer(), paired=False)
    # Whose completion meets whose prompt is a free choice; take theirs.
    theirs = [
        (ids[mask.bool()].tolist(), said[mask.bool()].tolist())
        for ids, mask, said in zip(
            batch["KL_input_ids"], batch["KL_attention_mask"], batch["KL_completion_mask"], strict=True
        )
    ]
    swapped = []
    for ids, said in theirs:
        prompt = [token for token, inside in zip(ids, said, strict=True) if not inside]
        own = next(i for i in items if i.first.input_ids[: len(prompt)] == prompt)
        labels = [token if inside else -100 for token, inside in zip(ids, said, strict=True)]
        swapped.append(own._replace(second=type(own.second)(ids, labels)))
    objective = Objective("kto", 0.3, 0.0, 0.0, 1.5, 0.5, EOS)
    model = tiny(trained)
    metrics = objective.backward(model, swapped, objective.reference(tiny(frozen), swapped), 2)
    theirs_loss = trainer.compute_loss(trainer.model.train(), batch)
    theirs_loss.backward()
    assert metrics["loss"] == pytest.approx(theirs_loss.item(), abs=1e-5)
    assert (metrics["kl"] > 0) == (trained == 2)  # one baseline is above 0, the other held there
    torch.testing.assert_close(gradient(model), gradient(trainer.model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_simpo_equals_trl(label_smoothing, tmp_path):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    trainer = CPOTrainer(
        model=policy(),
        args=arguments(
            CPOConfig,
            tmp_path,
            loss_type="simpo",
            cpo_alpha=0.0,
            beta=0.3,
            simpo_gamma=0.7,
            label_smoothing=label_smoothing,
        ),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=make_tokenizer(),
    )
    assert_equal(our_loss("simpo", PAIRS, label_smoothing=label_smoothing), their_loss(trainer))


def test_sft_equals_trl(tmp_path):
    rows = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in PAIRS]
    trainer = trl.SFTTrainer(
        model=policy(),
        args=arguments(trl.SFTConfig, tmp_path, completion_only_loss=True),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=make_tokenizer(),
    )
    model = policy()
    ours = accumulate_sft_gradients(model, [encode_demonstration(row, make_tokenizer()) for row in rows], EOS)
    assert_equal((ours, gradient(model)), their_loss(trainer))


def test_the_reward_model_s_loss_equals_trl(tmp_path):
    from transformers import LlamaForSequenceClassification

    config = copy.deepcopy(make_model("llama").config)
    config.num_labels, config.pad_token_id = 1, 2
    torch.manual_seed(0)
    scorer = LlamaForSequenceClassification(config).eval()
    trainer = trl.RewardTrainer(
        model=copy.deepcopy(scorer),
        args=arguments(trl.RewardConfig, tmp_path, center_rewards_coefficient=0.01),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=make_tokenizer(),
    )
    tokenizer = make_tokenizer()
    sides = [
        [encode_answer(tokenizer, pair["prompt"], pair[side]) for pair in PAIRS]
        for side in ("chosen", "rejected")
    ]
    loss = bradley_terry_loss(*(forward_scores(scorer, side) for side in sides), centering=0.01)
    loss.backward()
    assert_equal((loss.item(), gradient(scorer)), their_loss(trainer))


def trl_importance_ratio(trained, sampled, mask, mode, low, high):
    """What TRL's GRPO trainer multiplies its loss by: its own statements, taken out of the method that has them."""
    from trl.trainer import grpo_trainer

    method = grpo_trainer.GRPOTrainer._generate_and_score_completions
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    (block,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and any(_assigns(s, "per_token_logps_diff") for s in node.body)
    )
    settings = {"mode": mode, "clip_min": low, "clip_max": high}
    trainer = types.SimpleNamespace(**{f"vllm_importance_sampling_{n}": v for n, v in settings.items()})
    given = {"old_per_token_logps": trained, "sampling_per_token_logps": sampled, "completion_mask": mask}
    space = vars(grpo_trainer) | given | {"self": trainer, "tool_mask": None}
    exec(compile(ast.Module(block.body, []), "<trl>", "exec"), space)
    return space["vllm_importance_sampling_ratio"]


def _assigns(statement, name):
    return isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", None) == name


@pytest.mark.parametrize(("low", "high"), [(None, 3.0), (0.5, 2.0), (0.8, None), (None, 1.0)])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_importance_weights_equal_trl(mode, low, high):
    torch.manual_seed(0)
    sampled = torch.randn(32, 7) - 2
    trained = sampled + 0.5 * torch.randn(32, 7)
    mask = torch.arange(7) < torch.randint(1, 8, (32, 1))
    theirs = trl_importance_ratio(trained, sampled, mask.long(), mode, low, high).expand(32, 7)
    ours = importance_weights(trained - sampled, mask, mode, high, low)
    assert torch.allclose(ours[mask], theirs[mask], atol=1e-5, rtol=1e-5)
    assert ours[mask].unique().numel() > 10


def their_grpo_loss(log_probs, entropies, inputs, beta, budget, loss_type, corrected, ent_coef):
    """The loss of TRL's GRPO trainer on given log-probabilities: its own method, on settings alone."""
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (log_probs, entropies, None),
        args=types.SimpleNamespace(use_bias_correction_kl=corrected, delta=None),
        accelerator=types.SimpleNamespace(
            gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True, num_processes=1
        ),
        model=types.SimpleNamespace(training=True),
        beta=beta,
        loss_type=loss_type,
        entropy_coef=ent_coef,
        _entropy_bonus_enabled=True,
        max_completion_length=budget,
        epsilon_low=0.2,
        epsilon_high=0.2,
        top_entropy_quantile=1.0,
        importance_sampling_level="token",
        current_gradient_accumulation_steps=1,
        _metrics={"train": collections.defaultdict(list)},
        **dict.fromkeys(("aux_loss_enabled", "use_vllm", "use_adaptive_entropy"), False),
        off_policy_mask_threshold=None,
    )
    return trl.GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("corrected", [True, False], ids=["corrected", "as published"])
@pytest.mark.parametrize(
    ("loss_type", "average"), [("grpo", "sequence"), ("bnpo", "token"), ("dr_grpo", "constant")]
)
def test_grpo_with_its_entropy_bonus_and_its_kl_equals_trl(loss_type, average, corrected):
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    old, ref = (-torch.rand(4, 4, dtype=torch.float64) for _ in range(2))
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
    agent = GRPO(
        "auto",
        make_env(2, kl_coef=0.3),
        n_episodes=4,
        group_size=2,
        average=average,
        kl_in="loss",
        kl_loss_estimator="k3-corrected" if corrected else "k3",
        ent_coef=0.4,
        entropy_average="token",
        clip_range=0.2,
    )
    batch = Rollout({}, old, old, old, old, old, mask, mask, ref_log_probs=ref)
    batch.advantages = advantages[:, None] * mask

    def leaves():
        moved = (old + 0.3 * torch.linspace(-1, 1, 16, dtype=torch.float64).view(4, 4)).requires_grad_()
        return moved, torch.linspace(0.5, 2, 16, dtype=torch.float64).view(4, 4).requires_grad_()

    ours, theirs = leaves(), leaves()
    weights = agent.loss_weights(batch)
    loss = (agent.loss(batch, Evaluation(ours[0], None, ours[1]))[0] * weights).sum()
    loss.backward()
    ids = torch.zeros(4, 4, dtype=torch.long)
    inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask.long()}
    inputs |= {"advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref}
    expected = their_grpo_loss(*theirs, inputs, 0.3, 6, loss_type, corrected, 0.4)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.grad[mask], its.grad[mask], rtol=1e-5, atol=1e-9)
