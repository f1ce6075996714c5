"""What PyTorch's pickles say of tensors: the names that they call, and what each call describes.

Every tensor is a window of a storage (``TensorPlan``); nothing is made here. What tensors look like in a pickle:
``torch/_utils.py``, ``torch/serialization.py``. Rules raise ValueError for arguments that make no sense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MAX_DIMENSIONS = 16

STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
    # Of quantised tensors, which are refused by their own name when they are rebuilt.
    "QInt8Storage": torch.int8, "QUInt8Storage": torch.uint8, "QInt32Storage": torch.int32,
    # Without a type of its own: counted in bytes, and the tensor names its dtype.
    "UntypedStorage": torch.uint8,
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *STORAGES.values(), torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
    )
}  # fmt: skip
UNUSUAL = {
    "_rebuild_sparse_tensor": "a sparse tensor", "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_qtensor": "a quantised tensor", "_rebuild_meta_tensor_no_storage": "a meta tensor",
    "_rebuild_nested_tensor": "a nested tensor", "_rebuild_device_tensor_from_numpy": "a tensor of another device",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
    "_rebuild_wrapper_subclass": "a tensor of another class",
}  # fmt: skip


@dataclass(frozen=True)
class StoragePlan:
    """A run of ``count`` values of ``dtype`` that the file keeps under ``key``."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class TensorPlan:
    """A tensor as a window of a storage. ``offset`` and ``stride`` are in values of ``dtype``."""

    storage: StoragePlan
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Other:
    """Something that is no dense tensor, in words; ``tensor``: whether it is one of another sort."""

    what: str
    tensor: bool = False


@dataclass(frozen=True)
class Name:
    """What a pickle calls: a name of a module, looked up in tables and never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def whole(value: Any) -> bool:
    """Whether it is a whole number that can be a size or an offset."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > MAX_DIMENSIONS or not all(whole(v) for v in value):
        raise ValueError("sizes and strides must be whole numbers")
    return value


def _tensor(arguments: tuple[Any, ...], dtype: torch.dtype | None = None) -> TensorPlan:
    storage, offset, shape, stride = arguments[:4]
    if not isinstance(storage, StoragePlan) or not whole(offset):
        raise ValueError("a tensor has no storage")
    shape, stride = _sizes(shape), _sizes(stride)
    if len(shape) != len(stride):
        raise ValueError("a tensor has not as many strides as dimensions")
    return TensorPlan(storage, dtype or storage.dtype, offset, shape, stride)


def _tensor_v3(arguments: tuple[Any, ...]) -> TensorPlan:
    given = arguments[6]
    if not isinstance(given, Name) or given.name not in DTYPES:
        raise ValueError("a tensor is of no known dtype")
    return _tensor(arguments, DTYPES[given.name])


def _parameter(arguments: tuple[Any, ...]) -> Any:
    if not isinstance(arguments[0], (TensorPlan, Other)):
        raise ValueError("a parameter has no tensor")
    return arguments[0]


ORDERED_DICT = Name("collections", "OrderedDict")
FROM_TYPE = Name("torch._tensor", "_rebuild_from_type_v2")
ARRAYS = frozenset({Name("numpy.core.multiarray", "_reconstruct"), Name("numpy._core.multiarray", "_reconstruct")})
CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    str(FROM_TYPE): _parameter,  # taken apart by the machine
}
