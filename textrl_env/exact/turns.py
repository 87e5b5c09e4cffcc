"""Conversations small enough to enumerate: their optimum, and the value and gradient of any policy.

A conversation is a chain of *stages*. A stage is one turn of the policy, a
:class:`~textrl_env.exact.token_mdp.TokenMDP` whose prompts are all that may have been said before it; then the
environment answers, each answer with a probability of its own, which opens the next stage. The policy has no part in
the answers, so the soft Bellman equation takes their mean::

    V(before the answer) = score + sum_o P(o | said) V(after o)

With that in place of the score, every stage is solved as a language of one turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from textrl_env.exact.solver import Solution, evaluate, solve
from textrl_env.exact.token_mdp import Levels, TokenMDP

#: What may be answered to a turn: probability, what is shown, reward, and whether the game ends.
Outcome = tuple[float, str, float, bool]


@dataclass(frozen=True)
class TurnMDP:
    """A conversation as arrays.

    A turn of stage ``k`` ends in one of ``E_k`` ways, numbered level by level, in a level row by row and token by
    token. The prompts of stage ``k + 1`` are ``e * M + m`` for the answer ``m`` to the turn ``e``.

    Args:
        stages: The turns of the policy. Scores are what a turn itself earns, on average over the answers to it.
        answers: Probabilities of the answers between them, ``[E_k, M]``; what is missing to 1 ends the conversation.
        starts: Probabilities of the prompts of the first stage; uniform if None.
    """

    stages: list[TokenMDP]
    answers: list[np.ndarray]
    starts: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.answers) != len(self.stages) - 1:
            raise ValueError(
                f"{len(self.stages)} stages have {len(self.stages) - 1} answers between them, got "
                f"{len(self.answers)}"
            )
        for k, table in enumerate(self.answers):
            expected = count_endings(self.stages[k])
            if len(table) != expected or table.size != self.stages[k + 1].num_prompts:
                raise ValueError(
                    f"answers[{k}] has the shape {table.shape}; stage {k} ends in {expected} ways, and stage "
                    f"{k + 1} has {self.stages[k + 1].num_prompts} prompts"
                )

    def folded(self, k: int, values: np.ndarray | None) -> TokenMDP:
        """Stage ``k`` with what comes after it in its scores; ``values`` are those of the next stage's prompts."""
        stage = self.stages[k]
        if values is None:
            return stage
        expected = (self.answers[k] * values.reshape(self.answers[k].shape)).sum(1)  # [E_k]
        scores = [level.copy() for level in stage.scores]
        for t, rows, tokens, at in _endings(stage):
            scores[t][rows, tokens] += expected[at]
        return replace(stage, scores=scores)


@dataclass(frozen=True)
class TurnValue:
    """What one policy is worth; scalars are averages over starts and answers.

    Attributes:
        objective: ``E[score] - kl_coef * kl``.
        score: ``E[score]``, summed over the turns.
        kl: ``KL(pi || pi_ref)`` of all that the policy writes.
        gradient: Of ``objective`` by the logits of a tabular softmax policy, ``[n_t, V]`` for each stage and level.
        visits: Probability of passing through each row, ``[n_t]`` for each stage and level.
        value: What is expected from each row on, ``[n_t]`` for each stage and level.
    """

    objective: float
    score: float
    kl: float
    gradient: list[Levels]
    visits: list[Levels]
    value: list[Levels]


def count_endings(stage: TokenMDP) -> int:
    """In how many ways a turn can end, over all prompts: ``E``."""
    return sum(len(rows) for _, rows, _, _ in _endings(stage))


def _endings(stage: TokenMDP) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """For each level: rows and tokens with which turns end, and their numbers."""
    found, count = [], 0
    for t in range(stage.horizon):
        tokens = np.flatnonzero(stage.ends(t))
        size = len(stage.ref_log_probs[t])
        rows = np.repeat(np.arange(size), len(tokens))
        found.append((t, rows, np.tile(tokens, size), count + np.arange(len(rows))))
        count += len(rows)
    return found


def solve_turns(mdp: TurnMDP) -> tuple[float, list[Solution]]:
    """The optimum ``J*`` of ``E[score] - kl_coef * KL(pi || pi_ref)``, and the solution of each stage."""
    values, solutions = None, []
    for k in reversed(range(len(mdp.stages))):
        solutions.insert(0, solve(mdp.folded(k, values)))
        values = solutions[0].value[0]
    return float(_starts(mdp) @ values), solutions


def evaluate_turns(mdp: TurnMDP, policies: Sequence[Levels]) -> TurnValue:
    """Everything about one policy, exactly.

    Args:
        mdp: The conversation.
        policies: Log-probabilities of each stage, ``[n_t, V]`` for each level.
    """
    values, found = None, []
    for k in reversed(range(len(mdp.stages))):
        found.insert(0, evaluate(mdp.folded(k, values), policies[k]))
        values = found[0].value[0]
    start, score, kl = _starts(mdp), 0.0, 0.0
    gradient, visits = [], []
    for k, stage in enumerate(mdp.stages):
        reached, ended = _visits(stage, policies[k], start)
        visits.append(reached)
        gradient.append(
            [
                r[:, None] * np.exp(p) * np.where(np.isneginf(p), 0.0, a)
                for r, p, a in zip(reached, policies[k], found[k].advantages, strict=True)
            ]
        )
        for r, p, q in zip(reached, policies[k], stage.ref_log_probs, strict=True):
            kl += float(r @ np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q)).sum(1))
        score += sum(
            float(ended[at] @ stage.scores[t][rows, tokens]) for t, rows, tokens, at in _endings(stage)
        )
        if k < len(mdp.answers):
            start = (ended[:, None] * mdp.answers[k]).ravel()
    value = [each.value for each in found]
    return TurnValue(float(_starts(mdp) @ values), score, kl, gradient, visits, value)


def _starts(mdp: TurnMDP) -> np.ndarray:
    count = mdp.stages[0].num_prompts
    return np.full(count, 1.0 / count) if mdp.starts is None else mdp.starts


def _visits(stage: TokenMDP, policy: Levels, start: np.ndarray) -> tuple[Levels, np.ndarray]:
    """Probabilities of passing through each row, and of each ending ``[E]``, from those of the prompts."""
    visits, ended = [start], []
    for t, rows, tokens, _ in _endings(stage):
        reached = visits[t][:, None] * np.exp(policy[t])
        ended.append(reached[rows, tokens])
        if t + 1 < stage.horizon:
            visits.append(reached[:, ~stage.ends(t)].ravel())
    return visits, np.concatenate(ended)


def from_text_game(
    env: Any, outcomes: Callable[[tuple[str, ...]], Sequence[Outcome]], lm: Any = None, prompt_id: int = 0
) -> tuple[TurnMDP, list[Levels]]:
    """The conversations of a ``TextGame-v0`` whose vocabulary, turns and budget are tiny.

    Args:
        env: Single or vector, wrapped or not; it starts from one opening only, and no ``stop`` ends its turns.
        outcomes: From what the policy has said, turn by turn, the outcomes of the last turn; equally many of each.
        lm: Who acts; the env's reference if None.
        prompt_id: A start with this opening.

    Returns:
        The conversations, and the log-probabilities of who acts for each stage.
    """
    game = env.unwrapped.dynamics
    reference, actor = game.lm, game.lm if lm is None else lm
    conversation = game.opening_of(prompt_id)
    contexts: list[tuple[np.ndarray, tuple[str, ...]] | None] = [(conversation.ids, ())]
    stages, answers, policies = [], [], []
    for turn in range(game.max_turns):
        ref_levels, levels, score_levels, endings = [], [], [], []
        prefixes = [(context, np.zeros(0, dtype=np.int64)) for context in contexts]
        for t in range(game.max_new_tokens):
            ref_levels.append(_next_log_probs(reference, prefixes))
            levels.append(_next_log_probs(actor, prefixes))
            ends = np.isin(np.arange(reference.vocab_size), reference.eos_ids) | (
                t + 1 == game.max_new_tokens
            )
            scores = np.zeros((len(prefixes), reference.vocab_size))
            for i, (context, written) in enumerate(prefixes):
                for token in np.flatnonzero(ends):
                    ending = _ending(game, outcomes, context, np.append(written, token))
                    scores[i, token] = 0.0 if ending is None else sum(p * r for p, _, r, _ in ending[1])
                    endings.append(ending)
            score_levels.append(scores)
            prefixes = [(c, np.append(w, token)) for c, w in prefixes for token in np.flatnonzero(~ends)]
        stages.append(TokenMDP(ref_levels, score_levels, game.kl_coef, tuple(reference.eos_ids.tolist())))
        policies.append(levels)
        if turn + 1 < game.max_turns:
            table, contexts = _answers(game, conversation, endings)
            answers.append(table)
    return TurnMDP(stages, answers), policies


def _next_log_probs(lm: Any, prefixes: list) -> np.ndarray:
    """``[n, V]`` after each prefix; uniform after what cannot have been said."""
    from textrl_env.lm.slot_decoder import SlotDecoder

    rows = [np.zeros(1, dtype=np.int64) if c is None else np.append(c[0], written) for c, written in prefixes]
    decoder = SlotDecoder(lm, len(rows), max(map(len, rows)), use_cache=False)
    found = decoder.prefill(np.arange(len(rows)), rows).double().log_softmax(-1).cpu().numpy()
    unreal = np.array([context is None for context, _ in prefixes])
    found[unreal] = -np.log(lm.vocab_size)
    return found


def _ending(game: Any, outcomes: Callable, context: Any, turn: np.ndarray) -> tuple | None:
    """A turn that has ended: its tokens with those before it, and its outcomes."""
    if context is None:
        return None
    ids, said = context
    said = (*said, game.turn_text(turn))
    return np.append(ids, turn), list(outcomes(said)), said


def _answers(game: Any, opening: Any, endings: list) -> tuple[np.ndarray, list]:
    """Probabilities of the answers that go on, ``[E, M]``, and the contexts that they open."""
    width = max(len(ending[1]) for ending in endings if ending is not None)
    table, contexts = np.zeros((len(endings), width)), []
    for e, ending in enumerate(endings):
        for m in range(width):
            if ending is None or m >= len(ending[1]) or ending[1][m][3]:
                contexts.append(None)  # nothing follows
                continue
            ids, found, said = ending
            table[e, m] = found[m][0]
            answer = game.layout.answer(found[m][1], opening, int(ids[-1]))
            contexts.append((np.append(ids, answer), said))
    return table, contexts
