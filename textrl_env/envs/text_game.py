"""TextGame-v0: several turns, between which a game answers; an action is still a token.

As in ``TextRLHF-v0`` there are two ways through one environment: ``step(token)``, and :meth:`TextGameEnv.run_episodes`,
in which all episodes generate until their turns end, the games answer, and so on. Who ends what, and what a game's
answer becomes, is decided in one place for both (:meth:`TextGameDynamics._hear`).
"""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from reward_models.data.encoding import TEMPLATE_COLUMNS, TextEncoder
from reward_models.data.records import load_records
from reward_models.warning import warn
from textrl_env import embedded
from textrl_env.core import Partial, object_array
from textrl_env.envs.text_picture import draw_response, token_texts
from textrl_env.envs.text_rlhf import MAX_NEW_TOKENS
from textrl_env.envs.writing import Episodes, Evaluate, Generate, WritingDynamics, WritingEnv
from textrl_env.errors import check_range
from textrl_env.games.layout import Layout, Opening
from textrl_env.games.loading import load_game
from textrl_env.games.playing import Answer, Players
from textrl_env.games.second_chance import SecondChance
from textrl_env.kl import KLEnv, KLVectorEnv
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.sequences import ENVIRONMENT, POLICY, PROMPT, Sequences
from textrl_env.lm.stop_strings import StopStrings

#: Tokens of a whole conversation, where the model could hold more and nothing was said.
MAX_LENGTH = 2048


@dataclasses.dataclass
class GameEpisodes(Episodes):
    """Whole episodes of games; ``responses`` are the turns of policy and game in between, one below the other.

    Attributes:
        turns: Turns that the policy had, int64 ``[B]``.
        success: bool ``[B]``, what the games' last infos said as ``is_success``; None where none ever does.
        turn: Which turn each of the policy's tokens belongs to, from 0, int64 ``[m]``.
        state: A number for what each of these turns answers, int64 ``[m]``; equal texts have equal numbers.
        turn_rewards: What the game gave for each turn, ``B`` arrays.
        truncated: bool ``[B]``, cut off by a time limit of the game's own.
    """

    turns: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    turn: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    state: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    success: np.ndarray | None = None
    turn_rewards: list[np.ndarray] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Conversation:
    """One episode as the game sees it.

    Attributes:
        opening: What the policy answers first.
        texts: Turns of the policy and of the game, as text, in their order.
        rewards: Of each turn of the policy.
        states: Of each turn, a number for what it answered.
        stop_reason: Why it ended; None while it goes on.
        truncated: Whether a time limit of the game's own has cut it off.
        failed: Whether it ended because the game failed.
        success: Whether the game's last info said ``is_success``.
        written: Tokens of the policy in the turns that have ended.
    """

    opening: Opening
    texts: list[str] = dataclasses.field(default_factory=list)
    rewards: list[float] = dataclasses.field(default_factory=list)
    states: list[int] = dataclasses.field(default_factory=list)
    stop_reason: str | None = None
    truncated: bool = False
    failed: bool = False
    success: bool = False
    written: int = 0

    @property
    def turns(self) -> int:
        """Turns that the policy has had."""
        return len(self.rewards)

    @property
    def response(self) -> str:
        """What was written, the game's last word left out."""
        return "\n".join(self.texts[:-1] if self.stop_reason else self.texts)


class TextGameDynamics(WritingDynamics):
    """``N`` games being played, as arrays; see :class:`TextGameEnv`."""

    start_option: ClassVar[str] = "prompt_id"
    budget_argument: ClassVar[str] = "max_turns * max_new_tokens"
    state_names: ClassVar[tuple[str, ...]] = (
        *WritingDynamics.state_names,
        "written_by",
        "turn_starts",
        "turn_ends",
        "playing",
    )
    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}

    def __init__(
        self,
        num_slots: int,
        game: Any = None,
        model: Any = None,
        kl_coef: float = 0.05,
        kl_estimator: str = "k1",
        max_turns: int = 4,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        max_episode_tokens: int | None = None,
        rows: Any = None,
        num_seeds: int = 100_000,
        game_kwargs: Mapping[str, Any] | None = None,
        stop: str | Sequence[str] | None = None,
        layout: str = "auto",
        rewriting_template: str = "error",
        max_answer_tokens: int | None = None,
        game_timeout: float | None = None,
        game_fallback: float | None = None,
        game_workers: int = 1,
        game_patience: float | None = None,
        temperature: float = 1.0,
        tokenizer: Any = None,
        device: str = "auto",
        dtype: str = "float32",
        autocast: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_control_tokens: bool = False,
        attn_implementation: str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        load_in_4bit: bool = False,
    ) -> None:
        super().__init__(num_slots, kl_coef, kl_estimator)
        check_range(
            1,
            max_turns=max_turns,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            max_episode_tokens=max_episode_tokens,
            num_seeds=num_seeds,
            max_answer_tokens=max_answer_tokens,
        )
        lm = CausalLM.load(
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
        self.encoder = TextEncoder(lm.tokenizer, chat_template_kwargs, allow_control_tokens)
        self.max_turns, self.num_seeds = max_turns, num_seeds
        self.max_episode_tokens = max_episode_tokens
        self.reports_success = False  # whether the game has ever said is_success
        self.rows = _load_rows(rows)
        self.made_of = f" (seed * {len(self.rows)} rows + row)"
        self._open_slots(lm, _whole_length(lm, max_length))
        self.max_new_tokens = _turn_budget(lm, self.max_length) if max_new_tokens is None else max_new_tokens
        if self.max_new_tokens >= self.max_length:
            raise ValueError(
                f"a turn of max_new_tokens={self.max_new_tokens} leaves no room for an opening in max_length="
                f"{self.max_length} tokens; lower the first or raise the second"
            )
        self.layout = Layout(
            self.encoder,
            layout,
            rewriting_template,
            lm.model.config.vocab_size,
            max_turns > 1,
            max_answer_tokens,
        )
        self.stop = None if stop is None else StopStrings(lm.tokenizer, stop)
        lm.check()
        make = load_game(SecondChance if game is None else game, game_kwargs)
        self.game_fallback, self.game_patience = game_fallback, game_patience
        self.players, self._fused_players = (
            Players(make, game_timeout, game_fallback, game_workers) for _ in range(2)
        )
        self.players.prepare(0)  # what is no game is found now and not in the first episode
        self.conversations: list[Conversation | None] = [None] * num_slots
        self.written_by = np.zeros((num_slots, self.max_length), dtype=np.int8)
        self.turn_starts = np.zeros((num_slots, max_turns), dtype=np.int64)
        self.turn_ends = np.zeros((num_slots, max_turns), dtype=np.int64)
        self.playing = np.zeros(num_slots, dtype=bool)
        self.cut = np.zeros(num_slots, dtype=bool)

    @property
    def budget(self) -> int:
        """The most tokens that the policy can write in an episode."""
        most = min(self.max_turns * self.max_new_tokens, self.max_length - 1)
        return most if self.max_episode_tokens is None else min(most, self.max_episode_tokens)

    @property
    def num_prompts(self) -> int:
        """How many starts there are: rows times seeds."""
        return self.num_seeds * len(self.rows)

    # -- the step way -----------------------------------------------------------------------------------

    def reset(self, slots: np.ndarray, starts: list[Any] | None) -> dict[str, np.ndarray]:
        ids = self.rng.integers(self.num_prompts, slots)
        texts = np.full(len(slots), None, dtype=object)
        for i, slot in enumerate(slots):
            if starts is not None and starts[i] is not None:
                ids[i] = self._check_prompt_id(starts[i])
            conversation = self._start(self.players, int(slot), int(ids[i]))
            self._begin(slot, conversation.opening.ids)
            self.written_by[slot] = PROMPT
            self.turn_starts[slot], self.turn_ends[slot] = 0, 0
            self.turn_starts[slot, 0] = self.length[slot]
            self.conversations[slot], self.playing[slot] = conversation, True
            texts[i] = conversation.opening.text
        self.prompt_id[slots] = ids
        return {"prompt": texts, "prompt_id": ids}

    def step(self, actions: np.ndarray, active: np.ndarray):
        ref_logprob, kl = self._write(actions, active)
        slots = np.flatnonzero(active)
        self.written_by[slots, self.length[slots] - 1] = POLICY
        rewards, self.cut = -self.kl_coef * kl, np.zeros(self.num_slots, dtype=bool)
        terminated, over = np.zeros((2, self.num_slots), dtype=bool)
        turn, given = np.zeros(self.num_slots, dtype=np.int64), np.zeros(self.num_slots)
        words = np.full(self.num_slots, None, dtype=object)
        answered = np.zeros(self.num_slots, dtype=np.int64)
        ended = [slot for slot in slots if self._is_over(slot)]
        for slot, answer in zip(ended, self._ask(self.players, ended), strict=True):
            conversation = self.conversations[slot]
            over[slot], turn[slot] = True, conversation.turns
            words[slot], given[slot] = answer.text, answer.reward
            self.turn_ends[slot, conversation.turns] = self.length[slot]
            ids = self._hear(conversation, answer, self.length[slot], self._turn_tokens(slot))
            self._append(slot, ids)
            answered[slot] = conversation.states[-1]
            rewards[slot] += answer.reward
            self.cut[slot] = conversation.truncated
            terminated[slot] = conversation.stop_reason is not None and not conversation.truncated
            if conversation.stop_reason is None:
                self.turn_starts[slot, conversation.turns] = self.length[slot]
        info = {"ref_logprob": ref_logprob, "kl": kl}
        info |= {
            "turn": Partial(turn, over),
            "game_text": Partial(words, over),
            "turn_reward": Partial(given, over),
            "turn_state": Partial(answered, over),
        }
        done = np.flatnonzero(terminated | self.cut)
        self.playing[done] = False
        return rewards, terminated, info, self._final_info(done) if len(done) else {}

    def _ask(self, players: Players, slots: Sequence[int]) -> list[Answer]:
        """What the games answer to the turns that have just ended."""
        texts = [self.turn_text(self._turn_tokens(slot)) for slot in slots]
        for slot, text in zip(slots, texts, strict=True):
            self.conversations[slot].texts.append(text)
        return players.answer(slots, texts)

    def _append(self, slot: int, ids: np.ndarray) -> None:
        """Put what the game wrote behind a slot's sequence."""
        start, stop = self.length[slot], self.length[slot] + len(ids)
        self.tokens[slot, start:stop] = ids
        self.written_by[slot, start:stop] = ENVIRONMENT
        self.length[slot] = stop

    def _is_over(self, slot: int) -> bool:
        return self.turn_is_over(self._turn_tokens(slot), self.conversations[slot].written)

    def _turn_tokens(self, slot: int) -> np.ndarray:
        """What the policy has written in the present turn."""
        start = self.turn_starts[slot, self.conversations[slot].turns]
        return self.tokens[slot, start : self.length[slot]]

    def _final_info(self, slots: np.ndarray) -> dict[str, np.ndarray]:
        conversations = [self.conversations[slot] for slot in slots]
        failed = np.array([each.failed for each in conversations], dtype=np.float64)
        parts = {} if self.game_fallback is None else {"score/game/failed": failed}
        if self.reports_success:
            parts["is_success"] = np.array([each.success for each in conversations])
        return parts | {
            "response": object_array([each.response for each in conversations]),
            "score": np.array([sum(each.rewards) for each in conversations], dtype=np.float64),
            "kl_sum": self.kl_sum[slots].copy(),
            "response_length": (self.written_by[slots] == POLICY).sum(1),
            "stop_reason": object_array([each.stop_reason for each in conversations]),
            "turns": np.array([each.turns for each in conversations], dtype=np.int64),
        }

    def written_by_policy(self) -> np.ndarray:
        """bool ``[N, L]`` over the observations: the tokens that the policy wrote."""
        column = np.arange(self.max_length) - (self.max_length - self.length)[:, None]
        return (column >= 0) & (np.take_along_axis(self.written_by, np.maximum(column, 0), axis=1) == POLICY)

    def render(self, slot: int, mode: str) -> str | np.ndarray:
        tokenizer, conversation = self.lm.tokenizer, self.conversations[slot]
        written = self.tokens[slot, self.prompt_length[slot] : self.length[slot]]
        prompt = "" if conversation is None else conversation.opening.text
        if mode == "rgb_array":
            pieces = token_texts(tokenizer, written)
            room = self.max_length - int(self.prompt_length[slot])
            return draw_response(prompt, pieces, room, float(self.kl_sum[slot]), not self.playing[slot])
        return f"[prompt] {prompt}\n[{len(written)} tokens] {tokenizer.decode(written, skip_special_tokens=False)}"

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        super().set_state(state)
        for slot in np.flatnonzero(self.playing):
            self._replay(int(slot))

    def _replay(self, slot: int) -> None:
        """Bring a slot's game to where its tokens are: it begins from the same start and gets the same turns."""
        self.conversations[slot] = conversation = self._start(self.players, slot, int(self.prompt_id[slot]))
        seen = [conversation.opening.ids]
        for start, end in zip(self.turn_starts[slot], self.turn_ends[slot], strict=True):
            if end == 0:
                break
            turn = self.tokens[slot, start:end]
            conversation.texts.append(self.turn_text(turn))
            answer = self.players.answer([slot], conversation.texts[-1:])[0]
            seen += [turn, self._hear(conversation, answer, int(end), turn)]
        known = np.concatenate(seen)
        if not np.array_equal(known, self.tokens[slot, : len(known)]) or conversation.stop_reason is not None:
            warn(
                f"the game of slot {slot} went another way when it was played again from prompt_id="
                f"{self.prompt_id[slot]} with the same turns, so this episode goes on from another state; a game draws "
                "all its random numbers from the seed of reset()"
            )
            conversation.stop_reason = None

    # -- the rules, shared by both ways -----------------------------------------------------------------

    def _start(self, players: Players, slot: int, prompt_id: int) -> Conversation:
        """Begin a game; ``prompt_id`` is ``seed * rows + row``."""
        seed, k = divmod(prompt_id, len(self.rows))
        row = self.rows[k]
        observation, info = players.start(slot, seed, row)
        template_row = {name: row[name] for name in TEMPLATE_COLUMNS if name in row}
        if "tools" in info:
            template_row["tools"] = info["tools"]
        opening = self.layout.opening(observation, template_row)
        if len(opening.ids) + self.max_new_tokens > self.max_length:
            raise ValueError(
                f"the game's opening for prompt_id={prompt_id} has {len(opening.ids)} tokens, which with a turn of "
                f"max_new_tokens={self.max_new_tokens} is more than max_length={self.max_length}; raise max_length "
                f"(the model's context holds {self.lm.max_length}), or lower max_new_tokens"
            )
        return Conversation(opening)

    def turn_is_over(self, turn: np.ndarray, written: int = 0) -> bool:
        """Whether the policy's turn ends with its last token; ``written`` tokens were in turns before it."""
        return (
            turn[-1] in self.lm.eos_ids
            or len(turn) >= self._room(written)
            or (self.stop is not None and self.stop.end(turn))
        )

    def opening_of(self, prompt_id: int) -> Opening:
        """The opening of a game that starts from ``prompt_id``."""
        return self._start(self._fused_players, 0, self._check_prompt_id(prompt_id)).opening

    def _room(self, written: int) -> int:
        """Tokens that a turn may have after ``written`` in those before it."""
        most = self.max_new_tokens
        return most if self.max_episode_tokens is None else min(most, self.max_episode_tokens - written)

    def turn_text(self, turn: np.ndarray) -> str:
        """A turn of the policy as the game gets it."""
        return self.layout.text(turn, turn[-1] in self.lm.eos_ids)

    def _hear(self, conversation: Conversation, answer: Answer, length: int, turn: np.ndarray) -> np.ndarray:
        """Note a game's answer, and whether the episode ends with it.

        Another turn begins only where its whole budget has room.

        Args:
            conversation: The policy's turn is in it already.
            answer: To that turn.
            length: Tokens of the sequence so far.
            turn: Those of the policy's turn.

        Returns:
            The tokens that follow, int64; none where they have no room.
        """
        shown = conversation.texts[-2] if len(conversation.texts) > 1 else conversation.opening.text
        conversation.states.append(zlib.crc32(shown.encode("utf-8", "surrogatepass")))
        conversation.texts.append(answer.text)
        conversation.rewards.append(answer.reward)
        conversation.written += len(turn)
        self.reports_success |= "is_success" in answer.info
        conversation.success = bool(answer.info.get("is_success", False))
        ids = self.layout.answer(answer.observation, conversation.opening, int(turn[-1]))
        after = length + len(ids)
        if answer.terminated or answer.truncated:
            conversation.stop_reason = "game"
            conversation.truncated, conversation.failed = not answer.terminated, answer.failed
        elif conversation.turns >= self.max_turns:
            conversation.stop_reason = "turns"
        elif self._room(conversation.written) < 1:
            conversation.stop_reason = "length"
        elif after + self.max_new_tokens > self.max_length:
            conversation.stop_reason = "context"
        return ids if after <= self.max_length else ids[:0]

    # -- the fused way ----------------------------------------------------------------------------------

    def run_episodes(
        self, generate: Generate, prompt_ids: np.ndarray, evaluate: Evaluate | None = None
    ) -> GameEpisodes:
        """Whole episodes from ``prompt_ids`` (int ``[B]``); see :meth:`TextGameEnv.run_episodes`."""
        prompt_ids = np.array([self._check_prompt_id(k) for k in prompt_ids], dtype=np.int64)
        started = time.perf_counter()
        players = self._fused_players
        played = [self._start(players, i, int(k)) for i, k in enumerate(prompt_ids)]
        seconds = time.perf_counter() - started
        sequences = Sequences.from_prompts([each.opening.ids for each in played])
        turn_lengths: list[list[int]] = [[] for _ in played]
        last_turns: dict[int, np.ndarray] = {}
        going = np.arange(len(played))
        while len(going) or players.busy:
            if len(going):
                rooms = [self._room(played[i].written) for i in going]
                turns, log_probs, native = self._next_turns(generate, sequences, going, rooms)
                known = None if log_probs is None else _spread(log_probs, going, len(played))
                turns_of_all = _spread(turns, going, len(played))
                sequences = sequences.extended(turns_of_all, POLICY, known, native)
                for i, turn in zip(going, turns, strict=True):
                    played[i].texts.append(self.turn_text(turn))
                    last_turns[i] = turn
                    turn_lengths[i].append(len(turn))
            started = time.perf_counter()
            players.ask(going, [played[i].texts[-1] for i in going])
            # Games that are slow do not hold up the others: those join a later round.
            heard = players.hear(self.game_patience)
            follow = [
                self._hear(played[i], answer, int(sequences.lengths[i]), last_turns[i]) for i, answer in heard
            ]
            answered = np.array([i for i, _ in heard])
            sequences = sequences.extended(_spread(follow, answered, len(played)), ENVIRONMENT)
            seconds += time.perf_counter() - started
            going = answered[[played[i].stop_reason is None for i in answered]]
        sequences = sequences if evaluate is None else evaluate(sequences)
        if sequences.log_probs is None:
            raise ValueError("generate() returned Sequences without log_probs, which the KL is charged by")
        return self._episodes(prompt_ids, played, sequences, turn_lengths, seconds)

    def _next_turns(
        self, generate: Generate, sequences: Sequences, going: np.ndarray, rooms: list[int]
    ) -> tuple[list[np.ndarray], list[np.ndarray] | None, bool]:
        """The next turns of some of the sequences, their log-probabilities, and whether our own decoder wrote them."""
        contexts = sequences[going].split(sequences[going].tokens)
        generated = Sequences.from_generated(generate(contexts), contexts)
        turns, log_probs = generated
        ends = [self._turn_length(turn, int(i)) for i, turn in zip(going, turns, strict=True)]
        ends = [min(end, room) for end, room in zip(ends, rooms, strict=True)]
        turns = [turn[:n] for turn, n in zip(turns, ends, strict=True)]
        if log_probs is not None:
            log_probs = [row[:n] for row, n in zip(log_probs, ends, strict=True)]
        return turns, log_probs, generated.native

    def _turn_length(self, turn: np.ndarray, episode: int) -> int:
        """Tokens of a generated turn up to where it ends by the rules of the step way."""
        if len(turn) > self.max_new_tokens:
            raise ValueError(
                f"generate() returned {len(turn)} tokens for episode {episode}; expected between 1 and max_new_tokens="
                f"{self.max_new_tokens}"
            )
        ends = np.flatnonzero(np.isin(turn, self.lm.eos_ids))
        end = ends[0] + 1 if len(ends) else len(turn)
        stop = None if self.stop is None else self.stop.first_end(turn[:end])
        return int(end if stop is None else stop)

    def _episodes(
        self,
        prompt_ids: np.ndarray,
        played: list[Conversation],
        sequences: Sequences,
        turn_lengths: list[list[int]],
        seconds: float,
    ) -> GameEpisodes:
        """Charge the KL on the policy's tokens, and put each turn's reward on its last one."""
        started = time.perf_counter()
        lengths = np.concatenate([np.array(each, dtype=np.int64) for each in turn_lengths])
        ends = np.cumsum(lengths) - 1  # each turn's last action among all actions
        charged = self.charge(sequences, ends, np.concatenate([each.rewards for each in played]))
        turns = np.array([each.turns for each in played], dtype=np.int64)
        failed = np.array([each.failed for each in played], dtype=np.float64)
        return GameEpisodes(
            sequences=charged,
            prompt_id=prompt_ids,
            prompts=[each.opening.text for each in played],
            score=np.array([sum(each.rewards) for each in played], dtype=np.float64),
            parts={} if self.game_fallback is None else {"game/failed": failed},
            responses=[each.response for each in played],
            stop_reason=[each.stop_reason for each in played],
            score_seconds=seconds + time.perf_counter() - started,
            truncated=np.array([each.truncated for each in played], dtype=bool),
            turns=turns,
            success=np.array([each.success for each in played]) if self.reports_success else None,
            turn=np.repeat(np.concatenate([np.arange(n) for n in turns]), lengths),
            state=np.repeat(np.concatenate([np.array(each.states) for each in played]), lengths),
            turn_rewards=[np.array(each.rewards, dtype=np.float64) for each in played],
        )


def _spread(rows: list[np.ndarray], at: np.ndarray, count: int) -> list[np.ndarray]:
    """Rows in their places among ``count``, empty ones elsewhere."""
    spread = [np.zeros(0, dtype=np.int64)] * count
    for i, row in zip(at, rows, strict=True):
        spread[i] = row
    return spread


def _load_rows(rows: Any) -> list[dict[str, Any]]:
    """The rows that a game may begin from; one empty one where there are none."""
    if rows is None:
        return [{}]
    records = load_records(rows, (), name="rows")
    found = [{name: value for name, value in row.items() if value is not None} for row in records.rows()]
    if any("seed" in row for row in found):
        raise ValueError(
            "rows: a column cannot be called 'seed', which reset() gets beside the row; rename it"
        )
    return found


def _whole_length(lm: CausalLM, max_length: int | None) -> int:
    if max_length is None:
        return MAX_LENGTH if lm.max_length is None else min(lm.max_length, MAX_LENGTH)
    if lm.max_length is not None and max_length > lm.max_length:
        raise ValueError(f"max_length={max_length} is more than the model's context holds, {lm.max_length}")
    return max_length


def _turn_budget(lm: CausalLM, max_length: int) -> int:
    """Tokens of a turn, where nothing was said."""
    if embedded.is_embedded_tokenizer(lm.tokenizer):
        return min(embedded.MAX_NEW_TOKENS, max_length - 1)
    return max(min(MAX_NEW_TOKENS, max_length // 4), 1)


class _TextGame(WritingEnv):
    """What the single and the vector env share beyond the other text environments."""

    dynamics: TextGameDynamics

    @property
    def max_turns(self) -> int:
        """The most turns that the policy may have."""
        return self.dynamics.max_turns

    @property
    def max_length(self) -> int:
        """The most tokens that a whole conversation may have."""
        return self.dynamics.max_length

    @property
    def stop(self) -> StopStrings | None:
        """Texts that end a turn."""
        return self.dynamics.stop


class TextGameEnv(_TextGame, KLEnv):
    """Play a text game token by token: the policy writes its turns, the game answers between them.

    ## Description
    A conversation of several turns as a Gymnasium environment and nothing else. An action is a token, as in
    ``TextRLHF-v0``, which is the case of one turn. When the policy has ended its turn, the game gets its text and
    answers; the answer becomes tokens that nobody acted: they carry no loss, no KL, no entropy and no value error.
    Without arguments the game is a question of the embedded world with a second chance.

    ## Action Space
    ``Discrete(vocab_size)``: the next token.

    ## Observation Space
    ``Dict(input_ids, attention_mask)``, int64, shape ``(max_length,)``, left-padded: the opening, and what policy and
    game have written in turn. ``env.unwrapped.written_by_policy``, bool of the same shape, says which tokens the policy
    wrote.

    ## Starting State
    The game's opening for a seed and a row, drawn uniformly. ``reset(options={"prompt_id": k})`` starts from seed
    ``k // rows`` and row ``k % rows``; the vector env takes one for each slot.

    ## Rewards
    What the game gives for a turn, on the turn's last token, and ``-kl_coef * kl_t`` on every token of the policy; see
    ``TextRLHF-v0`` for the KL, and tell the env who acts: ``env.unwrapped.bind_policy(log_prob)``.

    ## Episode End
    A turn ends with an end token, a text of ``stop``, or after ``max_new_tokens``. The episode ends when the game says
    so, after ``max_turns`` or ``max_episode_tokens``, or when another turn would not fit into ``max_length``: all
    ``terminated``, since these limits are part of the task. Only a game's own time limit is ``truncated``.

    ## Information
    reset: ``prompt`` (the opening), ``prompt_id``. Every step: ``ref_logprob``, ``kl``. On the last token of a turn:
    ``turn`` (from 0), ``game_text`` (what the game answered), ``turn_reward``, ``turn_state`` (a number for the text
    that the turn answered). At the end: ``response`` (the turns of both, one below the other, the game's last word
    left out), ``score`` (sum of the game's rewards), ``kl_sum``, ``response_length`` (the policy's tokens), ``turns``,
    ``stop_reason`` ("game", "turns", "length" or "context"); ``is_success`` where the game's info says it.

    ## Arguments
    - ``game`` (the embedded world's): a class or factory of games, ``"package.module:Name"``, ``"file.py:Name"``, an
      object to be copied; :class:`textrl_env.protocols.Game` says what a game is. ``game_kwargs`` go to the class.
    - ``model`` (embedded SFT model): folder or hub id of any Hugging Face causal LM; reference and initial policy.
    - ``kl_coef`` (0.05), ``kl_estimator`` ("k1").
    - ``max_turns`` (4); ``max_new_tokens`` (a quarter of ``max_length``, at most 256; 24 with the embedded model): the
      budget of a turn; ``max_episode_tokens`` (None): of all turns together; ``max_length`` (the model's context, at
      most 2048): of the whole sequence.
    - ``rows`` (None): a list of dicts, a file or a dataset; a game gets one as ``reset(seed, **row)``. ``num_seeds``
      (100,000): seeds are drawn below it.
    - ``stop`` (None): texts that end a turn; they stay in it.
    - ``layout`` ("auto"): "chat" puts the texts through the chat template, turn by turn, "text" one behind the other;
      "auto" is chat where there is a template. ``rewriting_template`` ("error"): a template that changes earlier turns
      is refused, or with "keep" they stay as they were written.
    - ``max_answer_tokens`` (None): longer answers of the game are cut, counted and warned of.
    - ``game_timeout`` (None): seconds for one call of a game; ``game_fallback`` (None): the reward of a turn whose game
      failed, and whose episode ends with it; None raises the error. ``game_workers`` (1): games that are called at the
      same time, each in a thread; ``game_patience`` (None): seconds after which, in the fused way, those that have
      answered go on without the others (the order of the sampling then depends on the clock).
    - ``temperature`` (1.0), ``tokenizer`` (the model's), ``device`` ("auto"), ``dtype`` ("float32"), ``autocast``,
      ``chat_template_kwargs`` (None), ``allow_control_tokens`` (False), ``attn_implementation``, ``device_map``,
      ``trust_remote_code`` (False), ``revision``, ``load_in_4bit`` (False): as in ``TextRLHF-v0``.
    - ``render_mode``: the conversation as text ("ansi") or as a picture ("rgb_array").

    ## References
    Abdulhai et al., LMRL Gym: Benchmarks for Multi-Turn Reinforcement Learning with Language Models (2023).

    ## Version History
    v0: first release.
    """

    dynamics_class = TextGameDynamics

    @property
    def written_by_policy(self) -> np.ndarray:
        """bool ``[max_length]`` over the present ``input_ids``: the tokens that the policy wrote."""
        return self.dynamics.written_by_policy()[0]


class TextGameVectorEnv(_TextGame, KLVectorEnv):
    """Many games at once, one batched forward per step; see :class:`TextGameEnv`."""

    dynamics_class = TextGameDynamics

    @property
    def written_by_policy(self) -> np.ndarray:
        """bool ``[num_envs, max_length]`` over the present ``input_ids``: the tokens that the policy wrote."""
        return self.dynamics.written_by_policy()
