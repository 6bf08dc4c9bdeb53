"""Dtypes, tolerances, and comparisons that report the expected and the actual values."""

import numpy as np
import pytest
import torch

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF)


def parameter(values: torch.Tensor) -> torch.nn.Parameter:
    """A parameter with the memory and strides of `values`."""
    return torch.nn.Parameter(values.detach())


def _has_named_parameters() -> bool:
    try:
        torch.optim.SGD([("weight", parameter(torch.zeros(1)))], lr=0.1)
    except TypeError:
        return False
    return True


has_named_parameters = _has_named_parameters()
"""Whether torch.optim takes pairs of a name and a parameter, and keeps the names."""

needs_named_parameters = pytest.mark.skipif(
    not has_named_parameters, reason="this torch.optim does not accept named parameters"
)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the rules' arithmetic and of the states: float64 for float64, otherwise float32."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


# Twenty steps with a few roundings each, on values around 1: about 50 half units in the last place.
ARITHMETIC = {torch.float32: 4e-6, torch.float64: 1e-13}


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to a 16-bit dtype; 0 if storage is as wide as the arithmetic."""
    return torch.finfo(dtype).eps / 2 if dtype in HALF else 0.0


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A copy of the values as float64; complex numbers as pairs."""
    tensor = tensor.detach().cpu().resolve_neg().resolve_conj()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.double().numpy().copy()


def assert_close(came, expected, tolerance: float, what: str, storage_rounding: float = 0.0) -> None:
    """Assert |came - expected| <= tolerance·(1 + |expected|) plus half a unit in the last place of the storage."""
    came = to_numpy(came) if isinstance(came, torch.Tensor) else np.asarray(came, dtype=np.float64)
    expected = to_numpy(expected) if isinstance(expected, torch.Tensor) else np.asarray(expected, dtype=np.float64)
    assert came.shape == expected.shape, f"{what}: the shape should be {expected.shape}, came {came.shape}"
    with np.errstate(all="ignore"):
        allowed = tolerance * (1 + np.abs(expected)) + storage_rounding * np.abs(expected)
        right = (np.abs(came - expected) <= allowed) | (came == expected) | (np.isnan(came) & np.isnan(expected))
    if not right.all():
        with np.errstate(all="ignore"):
            error = np.where(right, 0, np.nan_to_num(np.abs(came - expected) / allowed, nan=np.inf))
        worst = np.unravel_index(np.argmax(error), error.shape)
        raise AssertionError(
            f"{what}: {np.count_nonzero(~right)} of {right.size} elements wrong, worst at {tuple(map(int, worst))}: "
            f"expected {expected[worst]!r}, came {came[worst]!r}, allowed difference {allowed[worst]:.3g}"
        )


def bits(tensor: torch.Tensor) -> bytes:
    """The exact content, in logical order."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    """Every parameter and every state of an optimizer, bit for bit, by a readable name."""
    content = {}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        content[f"parameter {i}"] = bits(p)
        for key, value in optimizer.state.get(p, {}).items():
            content[f"{key} of parameter {i}"] = (
                bits(value) if isinstance(value, torch.Tensor) else repr(value).encode()
            )
    return content


def assert_same(came: dict[str, bytes], expected: dict[str, bytes], what: str) -> None:
    assert came.keys() == expected.keys(), f"{what}: expected {sorted(expected)}, came {sorted(came)}"
    different = [key for key in expected if came[key] != expected[key]]
    assert not different, f"{what}: these bits differ: {different}"
