"""Work shared out over the processes of one run, such that the results are those of one process.

The items are dealt out in rounds. Those of five over two processes:

    round 1    process 0: a    process 1: b
    round 2    process 0: c    process 1: d
    round 3    process 0: e

After each round every process has all of its results, in the order of the items. What is added up
is thus added in one order, however many processes there are, and rounds alike: float32 sums depend
on their order. torchrun or `accelerate launch` starts the processes; accelerate connects them.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import torch

from lorakit.errors import LorakitError
from lorakit.runs.processes import LostProcessError, process_count

if TYPE_CHECKING:
    import accelerate
    from torch.distributed import TCPStore

T = TypeVar("T")
R = TypeVar("R")

_WORD = f"lorakit/word/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"  # a key in the store
_LONGEST_CALL = datetime.timedelta(seconds=5)
_LONGEST_ROUND = datetime.timedelta(hours=12)  # how long a process waits for the others' results


class Exchange(Protocol):
    """Returns what every process passes to it, in the order of their numbers."""

    def __call__(self, value: T) -> list[T]: ...


def _alone(value: T) -> list[T]:
    return [value]


@dataclass(frozen=True)
class Team:
    """The processes of one run, and which of them this one is; alone, it computes everything.

    Its methods are called by all of the processes alike, in the same order.
    """

    count: int = 1
    number: int = 0
    exchange: Exchange = _alone

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reads pipes, writes and reports."""
        return self.number == 0

    def from_first(self, value: T) -> T:
        """Return the value that the first process passes."""
        return cast("T", self.exchange(value if self.is_first else None)[0])

    def in_turn(self, items: Sequence[T], compute: Callable[[T], R]) -> Iterator[R]:
        """Yield what `compute` returns for each item, in order, whichever process computed it."""
        for first in range(0, len(items), self.count):
            dealt = items[first : first + self.count]
            own = compute(dealt[self.number]) if self.number < len(dealt) else None
            for result in self.exchange(own)[: len(dealt)]:
                yield cast("R", result)

    def tensors_in_turn(
        self, items: Sequence[T], compute: Callable[[T], list[torch.Tensor]]
    ) -> Iterator[list[torch.Tensor]]:
        """Yield what `compute` returns for each item: float32 tensors of the same shapes for all.

        They travel as one vector. A process without an item in a round computes the last one once
        more, so that all run the model equally often, as a model that is sharded needs it.
        """
        if self.count == 1:
            yield from map(compute, items)
            return
        for first in range(0, len(items), self.count):
            dealt = items[first : first + self.count]
            own = compute(dealt[min(self.number, len(dealt) - 1)])
            device = own[0].device
            flat = torch.cat([part.detach().float().flatten().to(device) for part in own])
            sizes = [part.numel() for part in own]
            for vector in self.exchange(flat)[: len(dealt)]:
                parts = zip(vector.split(sizes), own, strict=True)
                yield [part.view(like.shape).to(like.device) for part, like in parts]


ALONE = Team()


def new_accelerator(device: str) -> accelerate.Accelerator:
    """Return the accelerator of this process, one of several under `accelerate launch` or torchrun.

    `device` is the type of the chosen device, never `auto`. Accelerate has to be told that this is
    a CPU: otherwise each of several processes believes that it is the only one. Raises LorakitError
    where it sees another number of processes than the launcher started.
    """
    import accelerate

    wait = accelerate.InitProcessGroupKwargs(timeout=_LONGEST_ROUND)
    accelerator = accelerate.Accelerator(cpu=device == "cpu", kwargs_handlers=[wait])
    if accelerator.num_processes != process_count():
        raise LorakitError(
            f"accelerate has connected {accelerator.num_processes} of {process_count()} processes; "
            "give --device cpu or cuda, or start them by torchrun"
        )
    return accelerator


def new_team(device: str) -> Team:
    """Return the team of this process, connected by accelerate; `device` is the type of its device.

    Without a launcher accelerate is not imported.
    """
    return team_of(new_accelerator(device)) if process_count() > 1 else ALONE


def team_of(accelerator: accelerate.Accelerator) -> Team:
    """Return the team of the processes that an accelerator has connected."""
    if accelerator.num_processes == 1:
        return ALONE
    return Team(accelerator.num_processes, accelerator.process_index, exchange)


def exchange(value: T) -> list[T]:
    """Return the values of all processes; a tensor has the same shape and dtype in each.

    Raises LostProcessError where one of them has ended.
    """
    try:
        if isinstance(value, torch.Tensor):
            tensors = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(tensors, value.contiguous())
            return cast("list[T]", tensors)
        values = [value] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(values, value)
        return values
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo's and NCCL's, of several lines
        raise LostProcessError(
            "another process of this run has ended; see its message, then start all of them again, "
            "with --resume if there is a checkpoint"
        ) from error


def disconnect() -> None:
    """Take leave of the other processes at the end of a run, if there are any."""
    if _connected():
        torch.distributed.destroy_process_group()


def leave_word(line: str) -> bool:
    """Leave a line for the first process to say, as this one ends; return whether it can hear it.

    It finds the line once it misses this process, or its launcher ends it.
    """
    if not _connected():
        return False
    with contextlib.suppress(RuntimeError):
        _meeting_place().set(_WORD, line)
        return True
    return False


def word_of_others() -> str | None:
    """Return the line that another process has left; None where there is none."""
    if _connected():
        with contextlib.suppress(RuntimeError):
            place = _meeting_place()
            if place.check([_WORD]):
                return bytes(place.get(_WORD)).decode()
    return None


def _connected() -> bool:
    """Return whether torch has connected this process with others."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _meeting_place() -> TCPStore:
    """Return a connection to the store at the address at which the processes have met."""
    from torch.distributed import TCPStore  # which not every torch has

    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=_LONGEST_CALL,
    )
