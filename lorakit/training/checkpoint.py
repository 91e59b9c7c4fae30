"""Checkpoints: what a killed training run needs to resume and end in the same bytes.

One safetensors file beside the output, replaced atomically after every epoch, every so many steps,
and where Ctrl-C or SIGTERM ends the run: the weights, the best weights, AdamW's moments, the state
of the trainer's hooks, and how far training has come, the losses of a begun epoch included. Data
order and dropout follow from the seed and the step. Its key is a hash of everything that shapes the
run, so that only the same run resumes from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from lorakit.adapters.safetensors import read_tensors, write_tensors
from lorakit.adapters.tensors import Tensor
from lorakit.errors import LorakitError
from lorakit.files import atomic_path
from lorakit.models.lora import trained
from lorakit.runs.processes import LostProcessError
from lorakit.runs.resume import path_beside, run_key
from lorakit.runs.signals import STOPPED, deferred
from lorakit.training.progress import Progress
from lorakit.training.trainer import Trainer

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_HOOK = "hook"
# What reading a checkpoint that was changed, or is another program's, can raise.
_DAMAGE = (KeyError, TypeError, ValueError, RuntimeError, RecursionError)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The checkpoint of one run, at `path`; None if nothing can be saved (output to stdout)."""

    path: Path | None
    key: str

    def save(self, trainer: Trainer) -> None:
        """Write the state of `trainer`, if it is between two steps; before the first there is none.

        Of several processes only the main one writes.
        """
        is_main, is_due = trainer.accelerator.is_main_process, trainer.progress.step > 0
        if self.path is None or not is_main or not is_due or not trainer.is_between_steps:
            return
        self._write(dict(_named_tensors(trainer)), json.dumps(dataclasses.asdict(trainer.progress)))

    def _write(self, tensors: Mapping[str, torch.Tensor], progress: str) -> None:
        """Replace the file, if there is a path."""
        if self.path is None:
            return
        plain = {name: _tensor(value) for name, value in tensors.items()}
        with deferred(), atomic_path(self.path) as side, open(side, "wb") as stream:
            write_tensors(plain, {"key": self.key, "progress": progress}, stream)

    def save_sums(self, sums: Mapping[str, torch.Tensor], done: int) -> None:
        """Write what has been summed up over so many micro-batches."""
        self._write(sums, json.dumps(done))

    def saved_sums(self) -> tuple[dict[str, torch.Tensor], int]:
        """Return what `save_sums` wrote; nothing over none if there is no file.

        Raises LorakitError as `restore_` does.
        """
        if self.path is None or not self.path.exists():
            return {}, 0
        tensors, metadata = self._read(self.path)
        try:
            return tensors, int(json.loads(metadata["progress"]))
        except _DAMAGE as error:
            raise self._foreign() from error

    @contextlib.contextmanager
    def saving_at_end_of(self, trainer: Trainer) -> Iterator[None]:
        """Save the state where Ctrl-C, SIGTERM or SIGHUP ends the block, in which `trainer` trains.

        It has to be within `Trainer.train` or `advance`, which such a signal ends between steps.
        So does the end of another process of the run: a step changes nothing before its sums.
        """
        try:
            yield
        except (*STOPPED, LostProcessError):
            self.save(trainer)
            raise

    def restore_(self, trainer: Trainer) -> bool:
        """Bring `trainer` to where the run stopped; return False if there is no checkpoint.

        Raises LorakitError if the checkpoint is of a run with other settings or other data, and for
        a file that holds anything but a checkpoint.
        """
        if self.path is None or not self.path.exists():
            return False
        tensors, metadata = self._read(self.path)
        try:
            progress = Progress(**json.loads(metadata["progress"]))
            _check_progress(progress)
            _restore_(trainer, tensors)
        except _DAMAGE as error:
            raise self._foreign() from error
        trainer.progress = progress
        return True

    def _read(self, path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
        """Return the tensors and metadata of the file; LorakitError if another run's key is in."""
        try:
            tensors, metadata = read_tensors(path, str(path))
        except LorakitError as error:
            raise self._foreign() from error
        if metadata.get("key") != self.key:
            raise LorakitError(
                f"{path} is of a run with other settings, data or adapters; repeat those, or "
                "start afresh without --resume"
            )
        return {name: torch.tensor(t.array()) for name, t in tensors.items()}, metadata

    def _foreign(self) -> LorakitError:
        """Return the error for a file that training did not write, or that was changed since."""
        return LorakitError(f"{self.path} is not what training wrote; run without --resume")

    def remove(self) -> None:
        """Delete the file, once the run is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def checkpoint_of(output: str, *shaping: object) -> Checkpoint:
    """Return the checkpoint of a run that writes `output`, keyed by all that shapes the run."""
    return Checkpoint(path_beside(output, "resume"), run_key(*shaping))


def _tensor(value: torch.Tensor) -> Tensor:
    return Tensor.from_array(value.detach().float().cpu().numpy())


def _named_tensors(trainer: Trainer) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield everything that a checkpoint stores, by the names that _restore_ reads."""
    for name, layer in trainer.layers.items():
        for (part, parameter), best in zip(trained(layer).items(), trainer.best[name], strict=True):
            yield f"weight.{name}.{part}", parameter
            yield f"best.{name}.{part}", best
            for moment in _MOMENTS:
                yield f"{moment}.{name}.{part}", trainer.optimizer.state[parameter][moment]
    for hook, state in trainer.hook_states().items():
        yield from ((f"{_HOOK}.{hook}.{name}", value) for name, value in state.items())


def _check_progress(progress: Progress) -> None:
    """Raise TypeError for a field of another type than its default's."""
    for field in dataclasses.fields(progress):
        if type(getattr(progress, field.name)) is not type(field.default):
            raise TypeError(field.name)


def _check_shapes(trainer: Trainer, saved: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError for weights or moments of another shape than the parameters they are of."""
    for name, layer in trainer.layers.items():
        for part, parameter in trained(layer).items():
            for kind in ("weight", "best", *_MOMENTS):
                shape = () if kind == "step" else tuple(parameter.shape)
                if tuple(saved[f"{kind}.{name}.{part}"].shape) != shape:
                    raise ValueError(f"{kind}.{name}.{part}")


def _restore_(trainer: Trainer, saved: Mapping[str, torch.Tensor]) -> None:
    """Put the tensors of a checkpoint into the trainer: weights, moments, best, hooks."""
    device, counts_there = trainer.base.device, trainer.optimizer.defaults["fused"]
    _check_shapes(trainer, saved)
    for name, layer in trainer.layers.items():
        for part, parameter in trained(layer).items():
            with torch.no_grad():
                parameter.copy_(saved[f"weight.{name}.{part}"])
            moments = {m: saved[f"{m}.{name}.{part}"] for m in _MOMENTS}
            trainer.optimizer.state[parameter] = {
                m: value if m == "step" and not counts_there else value.to(device)
                for m, value in moments.items()
            }
        trainer.best[name] = tuple(saved[f"best.{name}.{part}"] for part in trained(layer))
    hook_states: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in saved.items():
        kind, _, rest = key.partition(".")
        if kind == _HOOK:
            hook, _, name = rest.partition(".")
            hook_states.setdefault(hook, {})[name] = value
    trainer.restore_hooks_(hook_states)
