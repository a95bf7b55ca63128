"""A CUDA device that is not there: CPU tensors labelled ``cuda:0``, and the rules of such a device.

Under `Device` the package takes its CUDA path on any machine: every operator computes on the CPU,
but operators that mix devices are refused as CUDA refuses them, and operators for which the CPU
would wait for the GPU are counted. The compiled operators of the package and torchvision's count
as one kernel each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)

# The shape of their result depends on values, so the CPU waits for them. `nms` also has such a
# result; bincount first reads its largest value.
DATA_DEPENDENT = {
    "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero",
    "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::bincount", "aten::repeat_interleave", "aten::multinomial", "torchvision::nms",
}  # fmt: skip
COPIES = {"aten::_to_copy", "aten::copy_"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


Module = TypeVar("Module", bound=nn.Module)


class MixedDevicesError(RuntimeError):
    """An operator got tensors of the CPU and of CUDA, which fails on a real device."""


class FakeTensor(Tensor):
    """A CPU tensor that says it is on ``cuda:0``."""

    original_tensor: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> FakeTensor:
        with torch.inference_mode(inner.is_inference()):  # views of ordinary tensors are ordinary
            made: FakeTensor = Tensor._make_wrapper_subclass(
                cls,
                inner.shape,
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=CUDA,
            )
        made.original_tensor = inner
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # pragma: no cover - only outside of the mode
        raise RuntimeError(f"{func} on a fake CUDA tensor outside of `Device`")

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def data_ptr(self) -> int:
        """Return the address on the CPU; wrappers have none."""
        return self.original_tensor.data_ptr()

    def tolist(self) -> Any:
        """Download, as `Tensor.tolist` does on CUDA; it refuses subclasses."""
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FakeTensor({list(self.shape)}, {self.dtype})"


class Device(TorchDispatchMode):
    """The rules of a CUDA device.

    Attributes:
        waits: how often the CPU waited for the device, by operator.
        launches: number of operators that ran on the device, views included.
    """

    # torch initialises CUDA, which is not there, unless a mode of this kind is active.
    _mode_key: ClassVar[Any] = torch._C._TorchDispatchModeKey.FAKE

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        torch._C._ensureCUDADeviceGuardSet()  # without a GPU, switching devices does nothing
        self.waits: Counter[str] = Counter()
        self.launches = 0
        self._before: list[bool] = []

    def __enter__(self) -> Device:
        # torch.tensor(..., device="cuda") then uploads where this mode sees it.
        self._before.append(torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        torch._C._set_only_lift_cpu_tensors(self._before.pop())
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # only inference mode leaves these operators whole
                return func.decompose(*args, **kwargs)
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        ours = [x for x in tensors if isinstance(x, FakeTensor)]
        wanted = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if ours:
            self.launches += 1
            self._count(name, args, kwargs, wanted)
            if name not in COPIES and any(
                x.dim() and not isinstance(x, FakeTensor) for x in tensors
            ):
                raise MixedDevicesError(f"{func} got tensors of the CPU and of cuda:0")
        elif wanted == "cuda" and name == "aten::_to_copy" and not kwargs.get("non_blocking"):
            self.waits["upload"] += 1
        if wanted is not None:
            kwargs["device"] = torch.device("cpu") if wanted == "cuda" else kwargs["device"]
        wrappers = {id(x.original_tensor): x for x in ours}
        plain = tree_map(
            lambda x: x.original_tensor if isinstance(x, FakeTensor) else x, (args, kwargs)
        )
        result = func(*plain[0], **plain[1])
        if name == "aten::copy_":
            return args[0]
        if not (wanted == "cuda" or (wanted is None and ours)):
            return result

        def label(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            # An operator in place returns its argument.
            return wrappers[id(x)] if id(x) in wrappers else FakeTensor(x)

        return tree_map(label, result)

    def _count(self, name: str, args: Any, kwargs: dict[str, Any], wanted: str | None) -> None:
        if name in DATA_DEPENDENT:
            self.waits[name] += 1
        elif name in INDEXING:
            chosen = [x for x in args[1] if x is not None]
            self.waits["mask"] += any(x.dtype in (torch.bool, torch.uint8) for x in chosen)
        elif name == "aten::_to_copy" and wanted not in (None, "cuda"):
            self.waits["download"] += 1
        elif name == "aten::copy_":
            if not isinstance(args[0], FakeTensor):
                self.waits["download"] += 1
            elif not isinstance(args[1], FakeTensor) and args[1].dim():
                self.waits["upload"] += not (len(args) > 2 and args[2])

    @property
    def synchronisations(self) -> int:
        """How often the CPU waited for the device."""
        return sum(self.waits.values())


def moved(module: Module) -> Module:
    """Label a module's parameters and buffers as CUDA tensors, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(
                    FakeTensor(parameter.detach()), requires_grad=parameter.requires_grad
                )
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = FakeTensor(buffer)
    return module


@contextmanager
def device() -> Iterator[Device]:
    """A fake CUDA device within the block."""
    cudnn = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False  # its operators have no kernel on the CPU
    try:
        with Device() as mode:
            yield mode
    finally:
        torch.backends.cudnn.enabled = cudnn
