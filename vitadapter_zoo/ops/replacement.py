"""Replacing the deformable attention in models that other projects built."""

import functools
from typing import Any, cast

from torch import nn

from vitadapter_zoo.ops import families

# The attribute of a replaced class that holds the class it stands for.
_ORIGINAL = "_vitadapter_zoo_original"


def accelerate(model: nn.Module) -> int:
    """Make the multi-scale deformable attentions of ``model`` use our operator, in place.

    Attentions that compute by ``grid_sample`` are replaced where their class is one that is known:
    those of transformers' Deformable DETR, GroundingDINO, MM-GroundingDINO, Mask2Former, OneFormer
    and OmDet-Turbo, and ``MSDeformAttn`` of Deformable DETR, DINOv2 and DINOv3. A class of the same
    name with other parameters, attributes or results stays as it is, and so do families in which
    the operator does not pay, see ``docs/other-detectors.md``.

    A replaced module keeps its parameters, names, hooks and mode; its class becomes a subclass of
    the old one with the same name. Copies and pickles of it are replaced too, and reading such a
    pickle needs this package. Second derivatives, forward-mode differentiation and vmap need
    `restore` first, because the operator does not have them.

    Args:
        model: any model; its submodules are searched.

    Returns:
        How many attentions were replaced by this call. A second call returns 0.

    Raises:
        ZooError: the operator cannot be used as ``VITADAPTER_ZOO_OP`` asks.
    """
    found = {families.found_in(module) for module in model.modules()} - {None}
    for module in cast("set[nn.Module]", found):
        kind: Any = type(module)
        module.__class__ = _replaced(kind)
    return len(found)


def restore(model: nn.Module) -> int:
    """Undo `accelerate`: every replaced attention of ``model`` computes as it did before.

    Returns:
        How many attentions were restored.
    """
    replaced = [module for module in model.modules() if _ORIGINAL in vars(type(module))]
    for module in replaced:
        module.__class__ = getattr(type(module), _ORIGINAL)
    return len(replaced)


@functools.cache
def _replaced(kind: Any) -> type[nn.Module]:
    """Return the subclass of ``kind`` with the new forward.

    It has the name of ``kind``, because some libraries find modules by the names of their classes.
    """
    namespace = {
        "__doc__": kind.__doc__,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__reduce_ex__": _reduce,
        "forward": families.new_forward(kind),
        _ORIGINAL: kind,
    }
    return cast("type[nn.Module]", type(kind.__name__, (kind,), namespace))


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickle by the original class, because a pickle finds classes by their names."""
    original = getattr(type(self), _ORIGINAL)
    parts = cast("tuple[Any, ...]", original.__reduce_ex__(self, 2))
    return (_empty, (original,), *parts[2:])


def _empty(original: Any) -> nn.Module:
    """Create a module for a pickle's state, replaced if this version of the class is known."""
    known = families.new_forward(original) is not None
    kind = _replaced(original) if known else original
    return kind.__new__(kind)
