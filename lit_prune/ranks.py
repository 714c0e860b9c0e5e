"""Several processes that prune one model together: who does what, and that all fail together.

What is exchanged is JSON text and tensors, over a process group of our own: no pickle, and no
timeout of the training's while rank 0 plans.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lit_prune.errors import LitPruneError, RankError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

T = TypeVar("T")

# The other ranks wait while rank 0 searches and measures; a process that ends is noticed at once.
_TIMEOUT = timedelta(days=1)
# Errors that all ranks raise as the same type, by name; one of a more special type as one of these.
_KINDS = {kind.__name__: kind for kind in LitPruneError.__subclasses__()}
# The process group that the training made, and ours beside it. Not in `Ranks`, which a callback
# holds: callbacks are copied.
_groups: list[tuple[Any, Any]] = []


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that prune the same model.

    Every method that speaks of all ranks must be called on all of them, in the same order. For a
    single process they do nothing.

    Attributes:
        rank: Number of this process.
        size: How many there are.

    Example:
        >>> alone = Ranks()
        >>> list(alone.share("abc")), alone.gather(3), alone.on_first(lambda: 5)
        (['a', 'b', 'c'], [3], 5)
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_training(cls) -> Self:
        """Return the ranks of the process group that is in use; call it on all ranks."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        world = dist.group.WORLD
        if not _groups or _groups[0][0] is not world:
            # gloo, on the CPU, whatever the training talks with: what is big lies there anyway
            _groups[:] = [(world, dist.new_group(backend="gloo", timeout=_TIMEOUT))]
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this is the process that decides."""
        return self.rank == 0

    def share(self, items: Iterable[T]) -> Iterator[T]:
        """Yield every ``size``-th item, from the ``rank``-th on."""
        return islice(items, self.rank, None, self.size)

    def gather(self, value: Any) -> list[Any]:  # noqa: ANN401 - whatever JSON can say
        """Return the value of every rank, in their order, on all ranks.

        Args:
            value: What JSON can say.
        """
        if self.size == 1:
            return [value]
        mine = _bytes(json.dumps(value))
        with self._in_touch():
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([len(mine)]), group=_groups[0][1])
            longest = max(int(length) for length in lengths)
            found = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            padded = torch.cat([mine, mine.new_zeros(longest - len(mine))])
            dist.all_gather(found, padded, group=_groups[0][1])
        pairs = zip(found, lengths, strict=True)
        return [json.loads(_text(text[: int(length)])) for text, length in pairs]

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks, on all of them, to the bit the same; on the CPU."""
        whole = tensor.detach().to("cpu", copy=True).contiguous()
        if self.size > 1:
            with self._in_touch():
                dist.all_reduce(whole, group=_groups[0][1])
        return whole

    def sum_on_first(self, tensor: Tensor) -> Tensor | None:
        """Return the sum over the ranks on rank 0, None on the others; on the CPU.

        For what is too large to be held by all. ``tensor`` may be overwritten.
        """
        whole = tensor.detach().cpu().contiguous()
        if self.size > 1:
            with self._in_touch():
                dist.reduce(whole, dst=0, group=_groups[0][1])
        return whole if self.is_first else None

    def on_first(self, make: Callable[[], T]) -> T | None:
        """Return what rank 0 makes, None on the others; if it fails, all raise the same error."""
        made, _ = self._made(make, _nothing)
        return made[0] if made else None

    def decide(
        self, make: Callable[[], T], write: Callable[[T], str], read: Callable[[str], T]
    ) -> T:
        """Return what rank 0 makes, on all ranks; if it fails, all raise the same error.

        Args:
            make: Called on rank 0 alone, while the others wait.
            write: Turns what it made to text.
            read: Makes the same from that text, on the other ranks.
        """
        made, text = self._made(make, write)
        return made[0] if made else read(text)

    def hand_out(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of rank 0, on the CPU of all; those of others are ignored."""
        if self.size == 1:
            return dict(tensors)
        kinds = [
            (name, list(x.shape), str(x.dtype).removeprefix("torch."))
            for name, x in tensors.items()
        ]
        found: dict[str, Tensor] = {}
        for name, shape, dtype in json.loads(self._broadcast(json.dumps(kinds))):
            here = torch.empty(shape, dtype=getattr(torch, dtype))
            if self.is_first:
                here = tensors[name].detach().cpu().contiguous()
            with self._in_touch():
                dist.broadcast(here, src=0, group=_groups[0][1])
            found[name] = here
        return found

    def agree(self, error: Exception | None) -> None:
        """Exchange failures; if any rank has one, all raise.

        A rank that failed raises its own error, the others that of the first that failed, as the
        same type where it is one of `lit_prune.errors`.
        """
        if self.size > 1:
            failures = self.gather(None if error is None else _described(error))
            if error is None:
                for rank, failure in enumerate(failures):
                    if failure is not None:
                        raise _error_of(rank, failure)
        if error is not None:
            raise error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let all ranks raise if what is inside fails on one; nothing inside may wait for others.

        A Ctrl-C or an exit is not exchanged: that process ends, and the others notice.
        """
        try:
            yield
        except Exception as error:
            self.agree(error)
            raise  # not reached: `agree` raises it
        self.agree(None)

    def same(self, text: str, what: str, remedy: str) -> None:
        """Refuse to go on where a text is not the same on all ranks.

        Args:
            text: What is compared, by a hash.
            what: What it says, for the message.
            remedy: What to do about it.

        Raises:
            RankError: On all ranks.
        """
        digests = self.gather(hashlib.sha256(text.encode()).hexdigest()[:12])
        for rank, digest in enumerate(digests):
            if digest != digests[0]:
                raise RankError(
                    f"{what}: rank 0 of {self.size} has digest {digests[0]}…, rank {rank} has "
                    f"{digest}…; expected the same on all. {remedy}"
                )

    def _made(self, make: Callable[[], T], write: Callable[[T], str]) -> tuple[list[T], str]:
        """Return what rank 0 made, in a list that is empty elsewhere, and the text of it."""
        if self.size == 1:
            return [make()], ""
        made: list[T] = []
        failure: Exception | None = None
        message: dict[str, Any] = {}
        if self.is_first:
            try:
                made = [make()]
                message["text"] = write(made[0])
            except Exception as error:
                failure, message["failure"] = error, _described(error)
        message = json.loads(self._broadcast(json.dumps(message)))
        if failure is not None:
            raise failure
        if "failure" in message:
            raise _error_of(0, message["failure"])
        return made, message["text"]

    def _broadcast(self, text: str) -> str:
        with self._in_touch():
            mine = _bytes(text)
            length = torch.tensor([len(mine)])
            dist.broadcast(length, src=0, group=_groups[0][1])
            if not self.is_first:
                mine = torch.zeros(int(length), dtype=torch.uint8)
            dist.broadcast(mine, src=0, group=_groups[0][1])
        return _text(mine)

    @contextmanager
    def _in_touch(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what gloo says of a connection that is closed
            raise RankError(
                f"rank {self.rank} of {self.size} lost touch with another rank, which ended or "
                f"did not answer for {_TIMEOUT}: {error} Its own output says why; restart all."
            ) from error


ALONE = Ranks()


def _nothing(_made: object) -> str:
    return ""


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _text(tensor: Tensor) -> str:
    return tensor.numpy().tobytes().decode()


def _described(error: Exception) -> list[str]:
    for kind in type(error).__mro__:
        if kind in _KINDS.values():
            return [kind.__name__, str(error)]
    return ["", f"{type(error).__name__}: {error}"]


def _error_of(rank: int, failure: list[str]) -> LitPruneError:
    name, words = failure
    return _KINDS.get(name, RankError)(f"rank {rank} failed, so all ranks stop: {words}")
