"""JSON that gives back exactly what it was given, for iterator states and checkpoint metadata."""

import base64
from typing import Any

import numpy as np


def encode_json(value: Any) -> Any:
    """JSON form from which `decode_json` gives back the same value exactly.

    Beside JSON's own types: tuples, bytes, NumPy arrays and numbers, NaN and Inf, keys that are
    not strings.

    Raises:
      TypeError: any other type.
    """
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if type(value) is float:
        return value if np.isfinite(value) else {"__float__": repr(value)}
    if isinstance(value, bytes):
        return {"__bytes__": base64.b64encode(value).decode()}
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc":
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        kind = "__array__" if isinstance(value, np.ndarray) else "__scalar__"
        return {kind: [value.dtype.str, list(value.shape), data]}
    if isinstance(value, list):
        return [encode_json(each) for each in value]
    if type(value) is tuple:
        return {"__tuple__": [encode_json(each) for each in value]}
    if isinstance(value, dict):
        plain = all(isinstance(key, str) and not key.startswith("__") for key in value)
        if plain:
            return {key: encode_json(each) for key, each in value.items()}
        return {"__dict__": [[encode_json(k), encode_json(v)] for k, v in value.items()]}
    raise TypeError(f"{type(value).__name__} cannot be stored as JSON")


def decode_json(value: Any) -> Any:
    """The inverse of `encode_json`."""
    if isinstance(value, list):
        return [decode_json(each) for each in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (tag, content), *_ = value.items()
        if tag == "__float__":
            return float(content)
        if tag == "__bytes__":
            return base64.b64decode(content)
        if tag in ("__array__", "__scalar__"):
            dtype, shape, data = content
            array = np.frombuffer(base64.b64decode(data), np.dtype(dtype)).reshape(shape).copy()
            return array if tag == "__array__" else array[()]
        if tag == "__tuple__":
            return tuple(decode_json(each) for each in content)
        if tag == "__dict__":
            return {decode_json(k): decode_json(v) for k, v in content}
    return {key: decode_json(each) for key, each in value.items()}
