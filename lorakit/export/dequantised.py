"""A quantised model's weights as the plain numbers they stand for, one in memory at a time.

How they lie in files, and how they are computed, is in quantised_forms.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lorakit.adapters.tensors import FloatArray, Tensor
from lorakit.errors import LorakitError, check_packages
from lorakit.export.model_folder import ModelFolder
from lorakit.export.quantised_forms import FORMS, MISFITS, Form, Parts, Shape
from lorakit.export.weight_files import WeightFiles
from lorakit.models.devices import DTYPES
from lorakit.models.quantisation import BITSANDBYTES


@dataclass(frozen=True)
class Dequantised:
    """A weight of this number format and shape, computed when its values are asked for."""

    dtype: str
    shape: Shape
    parts: Parts
    form: Form

    def array(self) -> FloatArray:
        """Return the values as float32."""
        values: FloatArray = self.form.compute(self.parts).float().numpy()
        return values

    def release(self) -> None:
        """Release the memory of the mapped files."""
        for part in self.parts.values():
            part.release()


Weight = Tensor | Dequantised
Files = Mapping[str, Mapping[str, Weight]]  # by file, then by the tensor's name


def check_dequantisable(model: ModelFolder) -> None:
    """Raise LorakitError for a model whose weights cannot be turned back into plain numbers."""
    method = model.quantisation
    if method == BITSANDBYTES:
        check_packages(f"the model {model.name}", BITSANDBYTES, extra="quant")
    elif method is not None and method not in FORMS:
        raise LorakitError(
            f"{model.name} is quantised ({method}), which lorakit cannot turn back into plain "
            "numbers; give the model it was made from by --model"
        )


def plain_weights(model: ModelFolder, weights: WeightFiles) -> Files:
    """Return a model's weights by file, the quantised ones as what they stand for.

    These get the number format of the model's config. Raises LorakitError for a model that
    check_dequantisable refuses, and for parts that do not fit each other.
    """
    check_dequantisable(model)
    if model.quantisation is None:
        return weights.files
    stored, dtype = weights.tensors, _format_of(model)
    files = {file: dict[str, Weight](tensors) for file, tensors in weights.files.items()}
    for form, stem in _marked(FORMS[model.quantisation], stored):
        names = {role: name.format(stem) for role, name in form.parts.items()}
        parts = {role: stored[name] for role, name in names.items() if name in stored}
        key = form.name.format(stem)
        shape = _shape(f"{model.name}: {key}", form, parts)
        home = next(tensors for tensors in files.values() if names["weight"] in tensors)
        for tensors in files.values():
            for name in names.values():
                tensors.pop(name, None)
        home[key] = Dequantised(dtype, shape, parts, form)
    return {file: tensors for file, tensors in files.items() if tensors}


def _format_of(model: ModelFolder) -> str:
    """Return the number format of a model's config as files name it; F32 where it names none."""
    dtype = getattr(model.model.config, "dtype", None)
    return next((name for name, kind in DTYPES.items() if kind == dtype), "F32")


def _marked(forms: tuple[Form, ...], stored: Mapping[str, Tensor]) -> Iterator[tuple[Form, str]]:
    """Yield the forms of quantised weights among tensors, with the stems of their names."""
    for name in stored:
        for form in forms:
            if match := form.mark.fullmatch(name):
                yield form, match[1]


def _shape(where: str, form: Form, parts: Parts) -> Shape:
    """Return a weight's shape; LorakitError naming it where its parts do not fit each other."""
    try:
        return form.shape_of(parts)
    except MISFITS as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error) or "not known"
        raise LorakitError(
            f"{where} does not fit what it was quantised by ({reason}); take a new copy"
        ) from None
