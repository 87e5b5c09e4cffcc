"""TextRLHF-v0: token generation as a Markov decision process.

Two ways through one environment, provably the same: ``step(token)``, for any Gymnasium agent,
and :meth:`TextRLHFEnv.run_episodes`, which takes whole responses from any generator, scores them with one
teacher-forced pass of the reference and one call of the reward, and hands out the same rewards.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from reward_models import Reward, TrainerState, load_reward
from reward_models.data.encoding import TEMPLATE_COLUMNS, TextEncoder, check_ids
from reward_models.warning import warn
from textrl_env import embedded
from textrl_env.data.prompts import load_prompts
from textrl_env.envs.text_picture import draw_response, token_texts
from textrl_env.envs.writing import Episodes, Evaluate, Generate, WritingDynamics, WritingEnv
from textrl_env.errors import check_choice, check_range
from textrl_env.kl import KLEnv, KLVectorEnv
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.sequences import Sequences

#: The response budget with a model that is not the embedded one, in tokens.
MAX_NEW_TOKENS = 256


def default_budget(lm: CausalLM, longest_prompt: int) -> int:
    """The response budget where none was asked for: what is usual for the model, as far as its context goes.

    Args:
        lm: The model that answers.
        longest_prompt: In tokens.
    """
    if embedded.is_embedded_tokenizer(lm.tokenizer):
        return embedded.MAX_NEW_TOKENS
    room = MAX_NEW_TOKENS if lm.max_length is None else lm.max_length - longest_prompt
    if 1 <= room < MAX_NEW_TOKENS:
        warn(
            f"max_new_tokens is {room} and not {MAX_NEW_TOKENS}: that is what the model's context of "
            f"{lm.max_length} tokens leaves beside prompts of {longest_prompt}"
        )
        return room
    return MAX_NEW_TOKENS


def last_tokens(lm: CausalLM, tokens: np.ndarray, limit: int) -> np.ndarray:
    """The last ``limit`` tokens of a long prompt; a token that every text begins with stays at its beginning."""
    if len(tokens) <= limit:
        return tokens
    if limit > 1 and tokens[0] == lm.tokenizer.bos_token_id:
        return np.concatenate([tokens[:1], tokens[1 - limit :]])
    return tokens[-limit:]


class TextRLHFDynamics(WritingDynamics):
    """``N`` responses being written, as arrays; see :class:`TextRLHFEnv`."""

    start_option: ClassVar[str] = "prompt_id"
    budget_argument: ClassVar[str] = "max_new_tokens"
    takes_no: ClassVar[dict[str, str]] = {
        "stop": "a response ends by an end token or its budget, so that a step and a whole response mean the same; more"
        " end tokens are the model's (generation_config.eos_token_id), texts that end a turn are TextGame-v0's"
    }
    extra_start_options: ClassVar[tuple[str, ...]] = ("prompt",)
    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}

    def __init__(
        self,
        num_slots: int,
        model: Any = None,
        reward: Any = None,
        prompts: Any = None,
        kl_coef: float = 0.05,
        kl_estimator: str = "k1",
        max_new_tokens: int | None = None,
        max_prompt_length: int | None = None,
        temperature: float = 1.0,
        missing_eos_penalty: float = 0.0,
        gold: Any = None,
        tokenizer: Any = None,
        device: str = "auto",
        dtype: str = "float32",
        autocast: bool | None = None,
        too_long: str = "error",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_control_tokens: bool = False,
        attn_implementation: str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        load_in_4bit: bool = False,
    ) -> None:
        super().__init__(num_slots, kl_coef, kl_estimator)
        check_range(1, max_new_tokens=max_new_tokens, max_prompt_length=max_prompt_length)
        check_choice("too_long", too_long, ("error", "skip", "cut"))
        self.missing_eos_penalty = missing_eos_penalty
        at_home = prompts is None
        if model is not None and (reward is None or prompts is None):
            missing = [name for name, value in (("reward", reward), ("prompts", prompts)) if value is None]
            warn(f"model={model!r} came without {' and '.join(missing)}: the embedded world's are used")
        self.lm = CausalLM.load(
            embedded.path("sft") if model is None else model,
            tokenizer,
            temperature,
            device,
            dtype,
            autocast,
            attn_implementation=attn_implementation,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            revision=revision,
            load_in_4bit=load_in_4bit,
        )
        self.encoder = TextEncoder(self.lm.tokenizer, chat_template_kwargs, allow_control_tokens)
        #: How far training is, for rewards that ask for ``trainer_state``; a trainer sets it.
        self.trainer_state = TrainerState()
        self.reward = load_reward(embedded.path("reward") if reward is None else reward)
        self.reward.use_ids(self.lm.tokenizer)
        if gold is None and at_home:
            gold = embedded.gold_score
        self.gold = None if gold is None else load_reward(gold)
        self.prompts = load_prompts(embedded.path("prompts_train") if prompts is None else prompts)
        self.prompt_texts, self.prompt_tokens = self._tokenize_all()
        self.prompts_skipped, self.prompts_cut = 0, 0
        if too_long != "error":
            self._shorten(self._prompt_limit(max_prompt_length, max_new_tokens), too_long)
        longest = max(len(tokens) for tokens in self.prompt_tokens)
        self.max_prompt_length = longest if max_prompt_length is None else max_prompt_length
        for k, tokens in enumerate(self.prompt_tokens):
            self._check_prompt_length(tokens, f"prompt {k}")
        budget = default_budget(self.lm, self.max_prompt_length) if max_new_tokens is None else max_new_tokens
        self.max_new_tokens = budget
        self._check_context()
        self.lm.check()
        self._open_slots(self.lm, self.max_prompt_length + self.max_new_tokens)
        self.custom_prompt: list[str | None] = [None] * num_slots

    @property
    def num_prompts(self) -> int:
        """How many prompts there are."""
        return len(self.prompt_tokens)

    # -- the step way -----------------------------------------------------------------------------------

    def reset(self, slots: np.ndarray, starts: list[Any] | None) -> dict[str, np.ndarray]:
        ids = self.rng.integers(self.num_prompts, slots)
        texts = np.full(len(slots), None, dtype=object)
        for i, slot in enumerate(slots):
            start = None if starts is None else starts[i]
            self.custom_prompt[slot] = None
            if isinstance(start, str):
                ids[i], self.custom_prompt[slot] = -1, start
                tokens = self._tokenize(start, "options['prompt']")
                self._check_prompt_length(tokens, f"options['prompt']={start!r}")
            else:
                ids[i] = ids[i] if start is None else self._check_prompt_id(start)
                tokens = self.prompt_tokens[ids[i]]
            self._begin(slot, tokens)
            texts[i] = self._prompt_text(slot, ids[i])
        self.prompt_id[slots] = ids
        return {"prompt": texts, "prompt_id": ids}

    def step(self, actions: np.ndarray, active: np.ndarray):
        ref_logprob, kl = self._write(actions, active)
        is_eos = np.isin(actions, self.lm.eos_ids)
        terminated = active & (is_eos | (self.length - self.prompt_length >= self.max_new_tokens))
        rewards = -self.kl_coef * kl
        final: dict[str, np.ndarray] = {}
        if terminated.any():
            final = self._final_info(np.flatnonzero(terminated), is_eos)
            rewards[terminated] += final["score"]
        return rewards, terminated, {"ref_logprob": ref_logprob, "kl": kl}, final

    def render(self, slot: int, mode: str) -> str | np.ndarray:
        written = self.tokens[slot, self.prompt_length[slot] : self.length[slot]]
        if mode == "rgb_array":
            over = len(written) >= self.max_new_tokens or bool(np.isin(written[-1:], self.lm.eos_ids).any())
            kl = float(self.kl_sum[slot])
            prompt, pieces = (
                self._prompt_text(slot, self.prompt_id[slot]),
                token_texts(self.lm.tokenizer, written),
            )
            return draw_response(prompt, pieces, self.max_new_tokens, kl, over)
        text = self.lm.tokenizer.decode(written, skip_special_tokens=False)
        return f"[prompt] {self._prompt_text(slot, self.prompt_id[slot])}\n[{len(written)} tokens] {text}"

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        super().set_state(state)
        for slot in np.flatnonzero(self.prompt_id < 0):
            ids = self.tokens[slot, : self.prompt_length[slot]]
            self.custom_prompt[slot] = self.lm.tokenizer.decode(ids, skip_special_tokens=True)

    def _final_info(self, slots: np.ndarray, is_eos: np.ndarray) -> dict[str, np.ndarray]:
        prompts = [self.tokens[s, : self.prompt_length[s]] for s in slots]
        responses = [self.tokens[s, self.prompt_length[s] : self.length[s]] for s in slots]
        texts = [self._prompt_text(s, self.prompt_id[s]) for s in slots]
        scored = self.score_responses(texts, prompts, responses, self.prompt_id[slots], is_eos[slots])
        info = {
            "response": np.array(scored["responses"], dtype=object),
            "score": scored["score"],
            "kl_sum": self.kl_sum[slots].copy(),
            "response_length": self.length[slots] - self.prompt_length[slots],
            "stop_reason": np.array(["eos" if e else "length" for e in is_eos[slots]], dtype=object),
        }
        if scored["scored"] is not None:
            info["scored"] = scored["scored"]
        return info | {f"score/{name}": part for name, part in scored["parts"].items()} | scored["logged"]

    # -- the fused way ----------------------------------------------------------------------------------

    def run_episodes(
        self, generate: Generate, prompt_ids: np.ndarray, evaluate: Evaluate | None = None
    ) -> Episodes:
        """Whole episodes from ``prompt_ids`` (int ``[B]``); see :meth:`TextRLHFEnv.run_episodes`."""
        prompt_ids = np.array([self._check_prompt_id(k) for k in prompt_ids], dtype=np.int64)
        prompts = [self.prompt_tokens[k] for k in prompt_ids]
        sequences = Sequences.from_generated(generate(prompts), prompts)
        sequences = sequences if evaluate is None else evaluate(sequences)
        self._check_generated(sequences)
        started = time.perf_counter()
        ends = np.cumsum(sequences.num_actions) - 1  # each episode's last action among all actions
        is_eos = np.isin(sequences.actions[ends], self.lm.eos_ids)
        texts = [self.prompts.texts[k] for k in prompt_ids]
        scored = self.score_responses(texts, prompts, sequences.responses, prompt_ids, is_eos)
        return Episodes(
            sequences=self.charge(sequences, ends, scored["score"]),
            prompt_id=prompt_ids,
            prompts=texts,
            rendered=[self.prompt_texts[k] for k in prompt_ids],
            stop_reason=["eos" if e else "length" for e in is_eos],
            score_seconds=time.perf_counter() - started,
            **scored,
        )

    def _check_generated(self, sequences: Sequences) -> None:
        if sequences.log_probs is None:
            raise ValueError("generate() returned Sequences without log_probs, which the KL is charged by")
        longest = int(sequences.num_actions.argmax())
        if sequences.num_actions[longest] > self.max_new_tokens:
            raise ValueError(
                f"generate() returned {sequences.num_actions[longest]} tokens for episode {longest}; expected between "
                f"1 and max_new_tokens={self.max_new_tokens}"
            )

    # -- scoring, shared by both ways -------------------------------------------------------------------

    def score_responses(
        self,
        texts: list[str],
        prompts: list[np.ndarray],
        responses: list[np.ndarray],
        prompt_ids: np.ndarray,
        is_eos: np.ndarray,
    ) -> dict[str, Any]:
        """Responses as text, their score (missing-EOS penalty taken off), its parts by name, and what was logged."""
        bodies = [r[:-1] if e else r for r, e in zip(responses, is_eos, strict=True)]
        given = [self._given(text, k) for text, k in zip(texts, prompt_ids, strict=True)]
        responses_as_text = [
            self.encoder.decode(b, isinstance(p, str)) for b, p in zip(bodies, given, strict=True)
        ]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for text, prompt in zip(responses_as_text, given, strict=True)
        ]
        columns = {
            name: [values[k] if k >= 0 else None for k in prompt_ids]
            for name, values in self.prompts.columns.items()
        }
        ids = {"prompt_ids": [p.tolist() for p in prompts], "completion_ids": [r.tolist() for r in responses]}
        asked = {"columns": columns, "trainer_state": self.trainer_state} | ids
        result = self.reward.score(given, completions, **asked)
        parts = dict(result.parts) if len(result.parts) > 1 else {}
        if self.gold is not None:
            parts["gold"] = self._gold_score(prompt_ids >= 0, given, completions, columns, ids)
        score = result.total - self.missing_eos_penalty * ~is_eos
        return {
            "responses": responses_as_text,
            "score": score,
            "parts": parts,
            "scored": result.scored,
            "logged": result.logged,
        }

    def _given(self, text: str, prompt_id: int) -> Any:
        """A prompt as rewards get it: messages where it came as messages, its text otherwise."""
        messages = self.prompts.messages[prompt_id] if prompt_id >= 0 and self.prompts.messages else None
        return text if messages is None else [dict(message) for message in messages]

    def _gold_score(
        self, known: np.ndarray, given: list[Any], completions: list[Any], columns: dict, ids: dict
    ) -> np.ndarray:
        """The gold judge's score where the prompt is one of ours, NaN elsewhere."""
        gold = np.full(len(known), np.nan)
        rows = np.flatnonzero(known)
        if len(rows):
            columns, ids = ({n: [v[i] for i in rows] for n, v in d.items()} for d in (columns, ids))
            chosen = [given[i] for i in rows], [completions[i] for i in rows]
            state = self.trainer_state
            gold[rows] = self.gold.score(*chosen, columns=columns, trainer_state=state, **ids).total
        return gold

    # -- prompts ----------------------------------------------------------------------------------------

    def _tokenize_all(self) -> tuple[list[str], list[np.ndarray]]:
        texts, tokens = [], []
        for k, text in enumerate(self.prompts.texts):
            prompt = self._given(text, k)
            row = {
                name: values[k] for name, values in self.prompts.columns.items() if name in TEMPLATE_COLUMNS
            }
            texts.append(self.encoder.prompt_text(prompt, row))
            tokens.append(self._tokenize(prompt, f"prompt {k}", row))
        return texts, tokens

    def _tokenize(self, prompt: Any, where: str, row: Mapping[str, Any] | None = None) -> np.ndarray:
        ids = self.encoder.prompt(prompt, row)
        if not ids:
            raise ValueError(f"{where}, {prompt!r}, has no tokens under this tokenizer")
        check_ids(ids, self.lm.model.config.vocab_size, where)
        return np.array(ids, dtype=np.int64)

    def _prompt_text(self, slot: int, prompt_id: int) -> str:
        return self.custom_prompt[slot] if prompt_id < 0 else self.prompt_texts[prompt_id]

    def _prompt_limit(self, max_prompt_length: int | None, max_new_tokens: int | None) -> int:
        """Tokens that a prompt may have, where longer ones are to be skipped or cut."""
        if max_prompt_length is not None:
            return max_prompt_length
        if self.lm.max_length is None:
            raise ValueError(
                "too_long says what becomes of long prompts, but the model has no limit to its context: say with "
                "max_prompt_length which are long"
            )
        usual = (
            embedded.MAX_NEW_TOKENS if embedded.is_embedded_tokenizer(self.lm.tokenizer) else MAX_NEW_TOKENS
        )
        limit = self.lm.max_length - (max_new_tokens or usual)
        if limit < 1:
            raise ValueError(
                f"max_new_tokens={max_new_tokens or usual} leaves no room for prompts in the model's context of "
                f"{self.lm.max_length} tokens; lower it"
            )
        return limit

    def _shorten(self, limit: int, too_long: str) -> None:
        """Leave out the prompts of more than ``limit`` tokens, or cut them down to their last ones; says how many."""
        total = len(self.prompt_tokens)
        longer = [len(tokens) > limit for tokens in self.prompt_tokens]
        if not any(longer):
            return
        if too_long == "cut":
            self.prompts_cut = sum(longer)
            self.prompt_tokens = [last_tokens(self.lm, tokens, limit) for tokens in self.prompt_tokens]
            warn(
                f"{self.prompts_cut} of {total} prompts have more than {limit} tokens: the model sees their last "
                f"{limit} (rewards see them whole)"
            )
            return
        self.prompts_skipped = sum(longer)
        if self.prompts_skipped == total:
            raise ValueError(
                f"all {total} prompts have more than {limit} tokens, so too_long='skip' leaves none; "
                "raise max_prompt_length or use 'cut'"
            )
        keep = [k for k, long in enumerate(longer) if not long]
        self.prompt_tokens = [self.prompt_tokens[k] for k in keep]
        self.prompt_texts = [self.prompt_texts[k] for k in keep]
        texts, messages = self.prompts.texts, self.prompts.messages
        self.prompts = dataclasses.replace(
            self.prompts,
            texts=[texts[k] for k in keep],
            columns={name: [column[k] for k in keep] for name, column in self.prompts.columns.items()},
            messages=None if messages is None else [messages[k] for k in keep],
        )
        warn(f"{self.prompts_skipped} of {total} prompts have more than {limit} tokens and are left out")

    def _check_prompt_length(self, tokens: np.ndarray, what: str) -> None:
        if len(tokens) > self.max_prompt_length:
            raise ValueError(
                f"{what} has {len(tokens)} tokens, more than max_prompt_length={self.max_prompt_length}; "
                "shorten it, raise max_prompt_length, or leave out or cut the long ones (too_long='skip' or 'cut')"
            )

    def _check_context(self) -> None:
        context, wanted = self.lm.max_length, self.max_prompt_length + self.max_new_tokens
        if context is not None and wanted > context:
            raise ValueError(
                f"the longest prompt ({self.max_prompt_length} tokens) and max_new_tokens="
                f"{self.max_new_tokens} need {wanted} positions, but the model's context holds {context}; "
                f"lower max_new_tokens to {max(context - self.max_prompt_length, 0)}, shorten the prompts, or leave "
                "out or cut the long ones (too_long='skip' or 'cut')"
            )


class _TextRLHF(WritingEnv):
    """What the single and the vector env share beyond the other text environments."""

    dynamics: TextRLHFDynamics

    @property
    def rewards(self) -> tuple[Reward, ...]:
        """What scores the responses: the reward, and the gold judge where there is one."""
        found = (self.dynamics.reward, self.dynamics.gold)
        return tuple(reward for reward in found if reward is not None)

    @property
    def max_prompt_length(self) -> int:
        """Longest prompt, in tokens, that an observation holds."""
        return self.dynamics.max_prompt_length

    @property
    def trainer_state(self) -> TrainerState:
        """How far training is, for rewards that ask for it; a trainer sets it."""
        return self.dynamics.trainer_state

    @trainer_state.setter
    def trainer_state(self, state: Any) -> None:
        self.dynamics.trainer_state = state

    def encoded_prompts(self, prompt_ids: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Prompts as token ids, int64 arrays, for those who write responses before :meth:`run_episodes` is called."""
        return [self.dynamics.prompt_tokens[k] for k in prompt_ids]


class TextRLHFEnv(_TextRLHF, KLEnv):
    """Write a response token by token; a reward model scores it at the end, a KL keeps it near a reference.

    ## Description
    Reinforcement learning from human feedback as a Gymnasium environment and nothing else. The state is the
    prompt and the tokens written so far, the action the next token, and an episode one response. Without
    arguments the embedded world is used: a tiny English model, its reward model and its prompts, all shipped
    with the package.

    ## Action Space
    ``Discrete(vocab_size)``: the next token. Ids that no token has are not actions, also where the model's
    logits are wider than its vocabulary.

    ## Observation Space
    ``Dict(input_ids, attention_mask)``, int64, shape ``(max_prompt_length + max_new_tokens,)``, left-padded: a
    batch of them feeds a transformers model as it is (with position ids counted from the mask) and the
    next-token logits are at the last position.

    ## Starting State
    A prompt, drawn uniformly. ``reset(options={"prompt_id": k})`` starts from prompt ``k``,
    ``reset(options={"prompt": text})`` from any text; the vector env takes one for each slot.

    ## Rewards
    ``1[t = T] * score - kl_coef * kl_t``, where ``kl_t`` estimates the KL of the acting policy from the
    reference at the sampled token: k1 ``log pi - log pi_ref``, k2 half its square, k3 ``exp(-k1) - 1 + k1``.
    ``step(token)`` cannot know ``log pi``, so tell the env who acts: ``env.unwrapped.bind_policy(log_prob)``;
    unbound, the acting policy is taken to be uniform.

    ## Episode End
    An end token, or the budget of ``max_new_tokens``: both ``terminated``, since the budget is part of the
    task and the text is scored as it stands. Never truncated.

    ## Information
    reset: ``prompt``, ``prompt_id`` (-1 for a text of your own). Every step: ``ref_logprob``, ``kl``. At the
    end: ``response``, ``score`` (before the KL; ``missing_eos_penalty`` taken off), ``kl_sum``,
    ``response_length`` (end token included), ``stop_reason`` ("eos" or "length"), ``score/<name>`` for each
    of several rewards, ``score/gold`` where there is a gold judge (NaN for a prompt of your own), ``scored`` (False
    where no reward applied, each having returned None).

    ## Arguments
    - ``model`` (embedded SFT model): folder or hub id of any Hugging Face causal LM; reference and initial
      policy. Live objects work too: ``TextRLHFEnv(model=m, tokenizer=t)``.
    - ``reward`` (embedded reward model): any ``reward(prompts, completions, **columns) -> list[float]``, a
      sequence-classification folder or hub id, ``"package.module:function"``, or a list of these, with weights
      if wanted.
      Where a prompt is a list of messages, the reward gets messages, too: the prompt as it came, and as completion
      ``[{"role": "assistant", "content": ...}]``.
    - ``prompts`` (embedded): a list, a path to .jsonl / .txt / .csv / .parquet, or a ``datasets.Dataset``. Message
      lists go through the chat template, with the columns ``tools`` and ``chat_template_kwargs`` where there are.
    - ``kl_coef`` (0.05), ``kl_estimator`` ("k1"); ``max_new_tokens`` (256, or what the context leaves; 24 with the
      embedded model); ``max_prompt_length`` (the longest prompt); ``too_long`` ("error"): what becomes of longer
      ones, "skip" leaves them out, "cut" keeps their last tokens, either way with a warning that counts them;
      ``temperature`` (1.0) divides the logits of the policy and the reference alike;
      ``missing_eos_penalty`` (0.0) is taken off the score of a response cut by the budget.
    - ``gold`` (embedded rubric on the embedded prompts): a second reward that is logged and never trained on.
    - ``tokenizer`` (the model's), ``device`` ("auto"), ``dtype`` ("float32") of the reference; ``autocast``
      (where CUDA is): bfloat16 matrix products in the reference and in policies that start from it.
    - ``attn_implementation``, ``device_map``, ``trust_remote_code`` (False), ``revision``, ``load_in_4bit`` (False):
      how the model is loaded, see :class:`reward_models.loading.LoadOptions`.
    - ``chat_template_kwargs`` (None): variables of the chat template, as ``{"enable_thinking": False}``, for prompts
      that are messages; ``allow_control_tokens`` (False): whether messages may hold control tokens, not only text.
    - ``render_mode``: the prompt and what has been written, as text ("ansi") or as a picture ("rgb_array").

    ## References
    Ouyang et al., Training language models to follow instructions with human feedback (2022).
    Stiennon et al., Learning to summarize from human feedback (2020). Schulman, Approximating KL divergence.

    ## Version History
    v0: first release.
    """

    dynamics_class = TextRLHFDynamics


class TextRLHFVectorEnv(_TextRLHF, KLVectorEnv):
    """Many responses at once, one batched forward per step; see :class:`TextRLHFEnv`.

    Under SAME_STEP autoreset a finished slot takes the next prompt at once: continuous batching.
    """

    dynamics_class = TextRLHFDynamics
