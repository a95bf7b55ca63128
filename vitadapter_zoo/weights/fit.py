"""Fit the tensors of a checkpoint to a network: names, shapes, dtypes and values, strictly."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vitadapter_zoo.errors import CheckpointError
from vitadapter_zoo.text import quoted, shown

# Absent parameters that may be filled, because the result is provably the same: layer scales of a
# row that was trained without them are ones. Never Uni-Perceiver's gamma_1/gamma_2: those start at
# zero, and filling them would silence the blocks.
LAYER_SCALES_OFF = {"adapter-t-deit-1x": re.compile(r"backbone\.blocks\.\d+\.gamma[12]")}
BATCH_COUNTERS = re.compile(r".*\.num_batches_tracked")  # take no part in evaluation
# What DDP, torch.compile, activation checkpoints and FSDP put anywhere into names ...
INSERTED = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
# ... and what Lightning, EMA helpers and scripts put before them.
PREFIXES = INSERTED | {"model", "net", "network", "detector", "ema", "ema_model", "model_ema",
                       "averaged_model", "_model", "student", "teacher", "state_dict"}  # fmt: skip
COUNTERS = {"n_averaged", "steps"}  # of torch's AveragedModel and mmengine's
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16)
LISTED = 8  # names shown per kind of mismatch


@dataclass(frozen=True)
class Fitted:
    """Tensors that fit a network exactly, and what was done to make them fit.

    Attributes:
        tensors: by the network's names, contiguous and without shared memory.
        cast: dtypes that were converted, with how many tensors each.
        filled: parameters absent from the file that were filled in.
        removed: prefixes that were removed from names, such as ``module.``.
        ignored: entries of the file that hold no weights, such as counters of an average.
    """

    tensors: dict[str, Tensor]
    cast: dict[str, int]
    filled: list[str]
    removed: list[str]
    ignored: list[str]


def fit(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    model: str,
    *,
    allow_nonfinite: bool = False,
) -> Fitted:
    """Bring tensors to the names, shapes and dtypes of a network, strictly.

    Known wrappers are removed from names. Floating-point tensors become float32 and BatchNorm
    counters int64. Only two kinds of absent parameters are filled, and reported: BatchNorm
    counters (zero), and the layer scales of ``adapter-t-deit-1x`` (ones), which was trained
    without them.

    Args:
        tensors: from the file.
        expected: the network's state dict; the meta device is enough.
        model: load name of the row.
        allow_nonfinite: accept NaN and infinite values.

    Raises:
        CheckpointError: missing, unexpected or mis-shaped parameters, all in one message; two
            values for one name; or a value that is not finite.
    """
    tensors, removed, ignored = unwrap(tensors, expected)
    filled = _filled(tensors, expected, model)
    _check(tensors, expected, filled, model, removed)
    cast: Counter[str] = Counter()
    fitted = {}
    for name, wanted in expected.items():
        value = filled[name] if name in filled else tensors[name]
        if value.dtype != wanted.dtype:
            cast[str(value.dtype).removeprefix("torch.")] += 1
        fitted[name] = value.to(wanted.dtype).contiguous()
    if not allow_nonfinite:
        check_finite(fitted, "the file")
    return Fitted(separate(fitted), dict(cast), list(filled), removed, ignored)


def unwrap(
    tensors: Mapping[str, Tensor], expected: Iterable[str]
) -> tuple[Mapping[str, Tensor], list[str], list[str]]:
    """Remove known wrappers from the names of a file, as far as that gives the network's names.

    Args:
        tensors: under the file's names.
        expected: the network's names.

    Returns:
        The tensors under the names that remain, the prefixes that were removed, and entries that
        were left out because they hold no weights.

    Raises:
        CheckpointError: two names of the file become one.
    """
    wanted = set(expected)
    if all(name in wanted for name in tensors):
        return tensors, [], []
    flat = {f"ema_{name.replace('.', '_')}" for name in wanted}  # mmcv's averages
    ignored = [
        name
        for name in tensors
        if name not in wanted and (bare_name(name) in flat or bare_name(name) in COUNTERS)
    ]
    renamed: dict[str, str] = {}
    removed = {}
    for name in tensors:
        if name in ignored:
            continue
        bare = name if name in wanted else bare_name(name)
        if bare in renamed:
            raise CheckpointError(
                f"there are two values for one name: {quoted(renamed[bare])} and {quoted(name)} "
                f"are both {quoted(bare)}; save only the set of weights that you want"
            )
        renamed[bare] = name
        if bare != name and bare in wanted:
            removed[_prefix(name, bare)] = True
    if not removed and not ignored:
        return tensors, [], []
    found = {bare: tensors[name] for bare, name in renamed.items()}
    return found, list(removed), ignored


def bare_name(name: str) -> str:
    """Remove from a name what wrappers such as DDP add to it."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in PREFIXES:
        parts = parts[1:]
    return ".".join(part for part in parts[:-1] if part not in INSERTED) + (
        f".{parts[-1]}" if len(parts) > 1 else parts[-1]
    )


def _prefix(name: str, bare: str) -> str:
    """What was removed: the words of ``name`` that ``bare`` does not have, in their order."""
    words, kept = [], bare.split(".")
    for part in name.split("."):
        if kept and part == kept[0]:
            kept.pop(0)
        else:
            words.append(part)
    return ".".join(words) + "."


def _filled(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], model: str
) -> dict[str, Tensor]:
    filled = {
        name: torch.zeros((), dtype=torch.int64)
        for name in expected
        if name not in tensors and BATCH_COUNTERS.fullmatch(name)
    }
    scales = LAYER_SCALES_OFF.get(model)
    if scales and not any(scales.fullmatch(name) for name in tensors):
        filled |= {
            name: torch.ones(value.shape)
            for name, value in expected.items()
            if scales.fullmatch(name)
        }
    return filled


def _check(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    filled: Mapping[str, Tensor],
    model: str,
    removed: list[str],
) -> None:
    """List everything that does not fit in one error."""
    both = [name for name in expected if name in tensors]
    problems = {
        "missing": [name for name in expected if name not in tensors and name not in filled],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{name} (file {list(tensors[name].shape)}, model {list(expected[name].shape)})"
            for name in both
            if tensors[name].shape != expected[name].shape
        ],
        "of another kind": [
            f"{name} (file {tensors[name].dtype}, model {expected[name].dtype})"
            for name in both
            if tensors[name].dtype
            not in (FLOATS if expected[name].is_floating_point() else INTEGERS)
        ],
        "without values (meta device)": [
            name for name in both if tensors[name].is_meta or tensors[name].layout != torch.strided
        ],
    }
    if any(problems.values()):
        without = f" (without {', '.join(quoted(prefix) for prefix in removed)})" if removed else ""
        raise CheckpointError(
            f"the weights do not fit {model}{without}:"
            + "".join(_listed(kind, names) for kind, names in problems.items() if names)
        )


def check_finite(tensors: Mapping[str, Tensor], holder: str) -> None:
    """Refuse NaN and infinity, which make every detection vanish.

    Args:
        tensors: by name.
        holder: what holds them, for the message.

    Raises:
        CheckpointError: with the names of the tensors.
    """
    wrong = [
        name
        for name, value in tensors.items()
        if value.is_floating_point() and value.numel() and not _is_finite(value)
    ]
    if wrong:
        raise CheckpointError(
            f"{holder} holds weights that are NaN, infinite or too large for "
            f"{str(tensors[wrong[0]].dtype).removeprefix('torch.')}:"
            f"{_listed('not finite', wrong)}\nThe training diverged or the file is damaged: take "
            "an earlier checkpoint. allow_nonfinite=True (--allow-nonfinite) loads it as it is"
        )


def _is_finite(value: Tensor) -> bool:
    # NaN passes through minimum and maximum, and neither needs memory, as isfinite does.
    low, high = torch.aminmax(value)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that overlap another one in memory, so that each can be changed alone."""
    places = sorted(
        (value.data_ptr(), value.data_ptr() + value.nbytes, name)
        for name, value in tensors.items()
        if value.nbytes and not value.is_meta
    )
    end, shared = 0, set()
    for start, stop, name in places:
        if start < end:
            shared.add(name)
        end = max(end, stop)
    return {name: value.clone() if name in shared else value for name, value in tensors.items()}


def _listed(kind: str, names: list[str]) -> str:
    more = f"\n    ... and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return (
        f"\n  {len(names)} {kind}:"
        + "".join(f"\n    {shown(name, 160)}" for name in names[:LISTED])
        + more
    )
