"""A base shared out over several processes: each holds a part of every weight (`--shard`).

Before a decoder layer computes, forward or backward, its weights are gathered from all processes,
and afterwards they are dropped again: torch's `fully_shard`. So of the base no device holds more
than its own part, one layer, and what is in no layer (embeddings, head) while that is in use. LoRA
is put on the sharded base, whole on every process, and belongs to no shard. All processes have to
run the model equally often, in the same order.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lorakit.errors import LorakitError
from lorakit.models.architecture import Model, decoder_layers
from lorakit.runs.processes import process_count


@contextlib.contextmanager
def in_turns() -> Iterator[None]:
    """Run the block in one process of each machine after the other, as their local ranks count.

    What a process holds in the block alone, the others of its machine do not hold at that time.
    """
    own = int(os.environ.get("LOCAL_RANK", "0"))
    for _ in range(own):
        torch.distributed.barrier()
    yield
    for _ in range(process_count() - own):  # as often on every process, of however many machines
        torch.distributed.barrier()


def shard_(model: Model, name: str, device: torch.device) -> None:
    """Move a model from the host to the devices of all processes, to each its part.

    One decoder layer at a time is whole on the device. Raises LorakitError for a model whose
    decoder layers are not in one list.
    """
    layers = decoder_layers(model)
    if layers is None:
        raise LorakitError(f"{name} has no list of decoder layers to shard; leave --shard out")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (process_count(),))
    for unit in (*layers, model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
