"""Several processes that share one run: who they are, and what they say to each other.

A launcher starts them (``torchrun --nproc-per-node 2 -m agents.cli train ...``, ``accelerate launch -m agents.cli train
...``), or a program of one's own in which ``torch.distributed`` has been set up before the agent is made.

A run is defined by its seed and its global batch, so that it is the same run at any number of processes. Every process
holds the same state: environment, random streams, weights, log. It does its share of the costly work (writing
responses, reading them with policy, critic, reference and reward models, the gradient) and the results are put
together, so what is computed from a whole rollout (advantages, whitening, weights of the loss) is computed from all of
it, by the very code of one process. What is left of difference is the order in which numbers are added up.

The first process is the main one: it alone logs, writes and calls callbacks, and the others follow it. Left out:
environments that are stepped, and runs that go on with fewer processes when one is lost.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import platform
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

#: Bytes of gradient in one message.
_BUCKET = 64 * 2**20
#: Hours that a process waits for another one, which may be evaluating or saving.
_PATIENCE = datetime.timedelta(hours=6)
#: Seconds in which a process that fails says so to the others.
_LAST_WORDS = 3.0
#: What must be alike everywhere.
_PACKAGES = ("textrl-env", "torch", "transformers", "gymnasium", "numpy")

_Result = TypeVar("_Result")
_Item = TypeVar("_Item")


class SharedError(RuntimeError):
    """An error that every process knows of; the main one says it, or the first that is left, the others leave."""


class Processes:
    """The processes of a run as one of them sees them; a single one by itself needs no messages.

    Args:
        rank: Of this process, from 0.
        count: Of all.
        store: Where a process that fails leaves a word for the others; None where the group was set up elsewhere.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None) -> None:
        self.rank, self.count, self._store = rank, count, store
        #: What all processes do together when the main one asks for it in the middle of its own work, by name.
        self.duties: dict[str, Callable[[], Any]] = {}
        self._on_its_own = False
        self._places: list[tuple[str, int]] = []
        if count > 1:
            self._places = self.gather((socket.gethostname(), os.getpid()))

    @property
    def is_main(self) -> bool:
        """Whether this process logs, writes and calls callbacks."""
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    def name(self, rank: int | None = None) -> str:
        """A process by rank, host and number; this one for None."""
        rank = self.rank if rank is None else rank
        host, pid = self._places[rank] if self._places else (socket.gethostname(), os.getpid())
        return f"rank {rank} of {self.count} (process {pid} on {host})"

    @property
    def on_its_own(self) -> bool:
        """Whether this is the main process in the middle of :meth:`on_main`, while the others wait."""
        return self._on_its_own

    # -- messages ---------------------------------------------------------------------------------------------

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.are_several:
            with self._hearing():
                dist.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Give every process the sum of all gradients; those that one has none of count as zeros.

        Many travel in one message, which takes memory for a copy of 64 MB at most, or of the largest tensor.
        """
        if not self.are_several:
            return
        trained = [p for p in parameters if p.requires_grad]
        found = torch.tensor(
            [p.grad is not None for p in trained], dtype=torch.int32, device=trained[0].device
        )
        somewhere = self.sum(found).tolist()
        used = [p for p, count in zip(trained, somewhere, strict=True) if count]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in used]):
            flat = self.sum(torch.cat([gradient.flatten() for gradient in bucket]))
            for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def gather(self, value: Any) -> list[Any]:
        """What each process has, in the order of their ranks."""
        if not self.are_several:
            return [value]
        found = [None] * self.count
        with self._hearing():
            dist.all_gather_object(found, value)
        return found

    def from_main(self, value: _Result) -> _Result:
        """What the main process has."""
        if not self.are_several:
            return value
        box = [value if self.is_main else None]
        with self._hearing():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, work: Callable[[], _Result]) -> _Result:
        """The result of what the main process alone does, in all of them.

        Raises:
            BaseException: In the main process, what ``work`` raised.
            SharedError: The same in the others.
        """
        if not self.are_several or (self.is_main and self._on_its_own):
            return work()
        if not self.is_main:
            return self._follow()
        failed, result = None, None
        self._on_its_own = True
        try:
            result = work()
        except BaseException as error:
            failed = error
        self._on_its_own = False
        self.from_main(("done", None if failed is None else _in_words(failed), result))
        if failed is not None:
            raise failed
        return result

    def _follow(self) -> Any:
        while True:
            what, message, result = self.from_main(("", None, None))
            if what == "done":
                break
            self.duties[what]()
        if message is not None:
            raise SharedError(message)
        return result

    def all_do(self, duty: str) -> Any:
        """The result of one of :attr:`duties`, for which the main process asks in the middle of :meth:`on_main`.

        Raises:
            RuntimeError: The others are elsewhere, after an error for example.
        """
        if self.are_several and not (self.is_main and self._on_its_own):
            raise RuntimeError(f"the other processes are elsewhere, and {duty} takes all of them")
        self.from_main((duty, None, None))
        return self.duties[duty]()

    # -- shares -----------------------------------------------------------------------------------------------

    def rows(self, count: int, group_size: int = 1) -> slice:
        """This process's share of ``count`` rows: neighbours, in whole groups as far as they go."""
        unit = group_size if count % (group_size * self.count) == 0 else 1
        edges = np.linspace(0, count // unit, self.count + 1).astype(int) * unit
        edges[-1] = count
        return slice(int(edges[self.rank]), int(edges[self.rank + 1]))

    def share(self, batch: Sequence[_Item], lengths: Sequence[int]) -> list[_Item]:
        """This process's items of a batch, of like number and length as the others'; all of them where it is alone.

        Args:
            batch: Any items, the same in every process.
            lengths: Of each of them.
        """
        if not self.are_several:
            return list(batch)
        return [batch[row] for row in deal(np.asarray(lengths), None, self.count)[self.rank]]

    def check_divides(self, **sizes: int | None) -> None:
        """Raise a ValueError for a size that cannot be shared evenly.

        Args:
            **sizes: By name; None is any.
        """
        for name, size in sizes.items():
            if size is not None and size % self.count:
                raise ValueError(
                    f"{name}={size} cannot be shared by {self.count} processes, so that some would wait for others: "
                    f"take a multiple of {self.count}, or another number of processes"
                )

    def check_alike(self, what: Mapping[str, Any]) -> None:
        """Raise a SharedError unless all processes agree on what is named, and on Python and the packages.

        Args:
            what: Comparable things by name.
        """
        if not self.are_several:
            return
        versions = {"python": platform.python_version()}
        versions |= {name: metadata.version(name) for name in _PACKAGES}
        everywhere = self.gather(versions | dict(what))
        for rank, theirs in enumerate(everywhere):
            for name, value in everywhere[0].items():
                if theirs.get(name) != value:
                    raise SharedError(
                        f"the processes of a run must be alike, but {self.name(rank)} has {name} {theirs.get(name)!r} "
                        f"and {self.name(0)} has {value!r}"
                    )

    # -- failures ---------------------------------------------------------------------------------------------

    def tell(self, error: BaseException) -> bool:
        """Leave a word for the others before this process goes; says whether it has news for the user.

        What went wrong in the main process, too, is no news in another.
        """
        if not self.are_several or self._store is None:
            return self.is_main
        if isinstance(error, SharedError):
            return self.rank == next(r for r in range(self.count) if r == self.rank or not self._is_gone(r))
        if self._store_is_gone():
            return True
        words = _in_words(error)
        with contextlib.suppress(RuntimeError):
            self._store.set(f"failed/{self.rank}", words)
            if not self.is_main:
                return self._last_words(0) != words
        return True

    @contextlib.contextmanager
    def _hearing(self) -> Iterator[None]:
        """Says which process was lost where a message does not come through."""
        try:
            yield
        except RuntimeError as error:
            raise SharedError(
                f"{self._lost(error)}; a run goes on with all of its processes or not at all"
            ) from error

    def _lost(self, error: RuntimeError) -> str:
        others = [rank for rank in range(self.count) if rank != self.rank]
        until = time.monotonic() + _LAST_WORDS
        while time.monotonic() < until:
            time.sleep(0.1)  # a process that was killed is seen to be gone a little after its messages end
            if self._store_is_gone():
                return f"{self.name(0)} is gone, killed or crashed, or ended by an error that it has told of"
            for rank in others:
                words = self._last_words(rank, wait=0.0)
                if words is not None:
                    return f"{self.name(rank)} failed: {words}"
                if self._is_gone(rank):
                    return f"{self.name(rank)} is gone, killed or crashed"
        return f"a process was lost ({_in_words(error)})"

    def _last_words(self, rank: int, wait: float = _LAST_WORDS) -> str | None:
        key, until = f"failed/{rank}", time.monotonic() + wait
        if self._store is None:
            return None
        with contextlib.suppress(RuntimeError):
            while not self._store.check([key]):
                if time.monotonic() >= until:
                    return None
                time.sleep(0.05)
            return self._store.get(key).decode()
        return None

    def _store_is_gone(self) -> bool:
        """Whether words cannot be left or read any more, since the process that keeps them has ended."""
        kept_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return not self.is_main and not kept_by_launcher and self._is_gone(0)

    def _is_gone(self, rank: int) -> bool:
        """Whether a process of this machine has ended."""
        if not self._places or self._places[rank][0] != socket.gethostname():
            return False
        try:
            os.kill(self._places[rank][1], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        try:
            state = Path(f"/proc/{self._places[rank][1]}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):  # no such files on this system
            return False
        return state == "Z"  # ended, and its launcher has not looked yet


def deal(lengths: np.ndarray, group: np.ndarray | None, count: int) -> list[np.ndarray]:
    """Rows for each of ``count`` processes, of like number and length; groups stay together where there are enough.

    Args:
        lengths: Steps of each row, int ``[B]``.
        group: Which group each row is of, int ``[B]``; None is one each.
        count: Processes.

    Returns:
        For each process its rows in their order; none for some where there are fewer rows than processes.
    """
    units = [np.array([row]) for row in range(len(lengths))]
    if group is not None:
        numbers = np.unique(group)
        if len(numbers) >= count:
            units = [np.flatnonzero(group == number) for number in numbers]
    longest_first = np.argsort([-lengths[unit].sum() for unit in units], kind="stable")
    hands: list[list[np.ndarray]] = [[] for _ in range(count)]
    for turn, unit in enumerate(longest_first):
        around, place = divmod(turn, count)
        # There and back, so that nobody always gets the longest of a round.
        hands[place if around % 2 == 0 else count - 1 - place].append(units[unit])
    return [np.sort(np.concatenate(hand)) if hand else np.zeros(0, dtype=np.int64) for hand in hands]


#: One process by itself.
ALONE = Processes()
_current = ALONE


def current() -> Processes:
    """The processes that this one is of: those of :func:`started`, of a group set up elsewhere, or none."""
    global _current
    if _current is ALONE and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        _current = Processes(dist.get_rank(), dist.get_world_size())
    return _current


def launched() -> int:
    """How many processes a launcher has started, as its environment variables say; 1 without one."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdecimal() else 1


@contextlib.contextmanager
def started() -> Iterator[Processes]:
    """Meet the other processes that a launcher has started, and part at the end.

    On a machine with GPUs each process takes one of its own.
    """
    global _current
    if launched() == 1 or dist.is_initialized():
        yield current()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, rank, count = next(dist.rendezvous("env://", timeout=_PATIENCE))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    words = dist.PrefixStore("textrl", store)
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", store), rank=rank, world_size=count, timeout=_PATIENCE
    )
    _current = Processes(rank, count, words)
    try:
        yield _current
    finally:
        _current = ALONE
        dist.destroy_process_group()


def fingerprint(weights: Iterable[Tensor]) -> str:
    """A digest by which processes see whether they hold the same weights."""
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(f"{tuple(weight.shape)} {weight.detach().double().sum().item()!r}".encode())
    return digest.hexdigest()[:16]


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in their order, as many as fit into a message, of one dtype and device each."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        alike = not bucket or (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or size + tensor.nbytes > _BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _in_words(error: BaseException) -> str:
    notes = [f" ({note})" for note in getattr(error, "__notes__", ())]
    return " ".join(f"{str(error) or type(error).__name__}{''.join(notes)}".split())
