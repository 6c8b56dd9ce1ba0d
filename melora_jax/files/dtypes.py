"""What files call a dtype: safetensors, and torch's pickled storages."""

from __future__ import annotations

import ml_dtypes  # also registers bfloat16 with NumPy, without which safetensors cannot read it
import numpy as np

_NAMES: tuple[tuple[type, str, str | None], ...] = (
    (np.float64, "F64", "DoubleStorage"),
    (np.float32, "F32", "FloatStorage"),
    (np.float16, "F16", "HalfStorage"),
    (ml_dtypes.bfloat16, "BF16", "BFloat16Storage"),
    (np.int64, "I64", "LongStorage"),
    (np.int32, "I32", "IntStorage"),
    (np.int16, "I16", "ShortStorage"),
    (np.int8, "I8", "CharStorage"),
    (np.uint64, "U64", None),
    (np.uint32, "U32", None),
    (np.uint16, "U16", None),
    (np.uint8, "U8", "ByteStorage"),
    (np.bool_, "BOOL", "BoolStorage"),
)

SAFETENSORS_DTYPES: dict[str, np.dtype] = {name: np.dtype(kind) for kind, name, _ in _NAMES}
"""The dtypes that safetensors and NumPy share, by safetensors' name."""

TORCH_STORAGES: dict[str, np.dtype] = {name: np.dtype(kind) for kind, _, name in _NAMES if name is not None}
"""The dtypes of torch's typed storages, by the storage's name."""
