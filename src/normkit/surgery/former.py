"""Load models that were pickled when this package was called evenkeel: ``torch.load(path, pickle_module=former, ...)``.

A pickle names each class by its module. The former names are looked up in one table of today's classes, so a class that
moves is followed by the import below. The marks on layers are renamed once everything is loaded.
"""

import pickle
from collections.abc import Callable
from typing import IO, Any

from torch import nn

from normkit.methods.baselines import Removed
from normkit.methods.batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from normkit.methods.batchless.layer import BatchlessNorm1d, BatchlessNorm2d, BatchlessNorm3d, _without_count
from normkit.methods.lp_norm import LpNorm1d, LpNorm2d, LpNorm3d
from normkit.methods.noisy_norm import MomentNoise, NoisyBatchNorm1d, NoisyBatchNorm2d, NoisyBatchNorm3d
from normkit.methods.revisited.input_norm import InputNorm
from normkit.methods.revisited.revisit import FeatureScale, Revision
from normkit.moments import Tally
from normkit.surgery.affine import PadChannels
from normkit.surgery.conversion_state import Origin, default_bias, load_other_form

FORMER, NOW = "evenkeel", "normkit"


def _inert_hook() -> Callable[..., None]:
    """Return what a pickled hook of BNP is: a hook that does nothing, since its optimizer is not in the pickle."""
    return _do_nothing


def _do_nothing(*_: Any) -> None: ...


_TODAY: dict[str, Any] = {
    **{
        cls.__name__: cls
        for cls in (
            *(BatchRenorm1d, BatchRenorm2d, BatchRenorm3d),
            *(BatchlessNorm1d, BatchlessNorm2d, BatchlessNorm3d),
            *(LpNorm1d, LpNorm2d, LpNorm3d),
            *(NoisyBatchNorm1d, NoisyBatchNorm2d, NoisyBatchNorm3d),
            *(InputNorm, Removed, PadChannels, MomentNoise),
        )
    },
    "Origin": Origin,
    "Revision": Revision,
    "FeatureScale": FeatureScale,
    "Tally": Tally,
    "translate": load_other_form,
    "default_bias": default_bias,
    "_without_count": _without_count,
    "_ignoring": _inert_hook,
}
"""Name in a former pickle -> today's object. The former names are written out where today's may change."""


class Unpickler(pickle.Unpickler):
    """Unpickler that takes names of the former package for today's. Otherwise it is the standard one."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Return the object that a pickle names.

        Raises:
            UnpicklingError: The former package had it and this one has no counterpart.
        """
        if module_name.partition(".")[0] != FORMER:
            return super().find_class(module_name, global_name)
        if global_name not in _TODAY:
            raise pickle.UnpicklingError(
                f"{module_name}.{global_name} has no counterpart in {NOW}; load the file with {FORMER}, revert the model and "
                "save its state_dict()"
            )
        return _TODAY[global_name]

    def load(self) -> Any:
        """Return the unpickled object, the marks on its layers under today's names."""
        loaded = super().load()
        for thing in self.memo.copy().values():  # every object of the pickle, wherever it hangs
            if isinstance(thing, nn.Module):
                for name in [name for name in vars(thing) if name.startswith(f"{FORMER}_")]:
                    vars(thing)[NOW + name.removeprefix(FORMER)] = vars(thing).pop(name)
        return loaded


def load(file: IO[bytes], **options: Any) -> Any:
    """Return the object of an open pickle file. It is what ``pickle.load`` is to its module.

    Args:
        file: Open in binary mode. As with every pickle, loading runs what the file says: load only files that you trust.
        options: Arguments of ``pickle.Unpickler``.
    """
    return Unpickler(file, **options).load()
