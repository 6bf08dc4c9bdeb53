"""The bits of everything computed element by element, which CPU kernels and CUDA kernels have in common.

Steps scaled by a norm are excluded: the norm is a sum, and CPU and CUDA add in different orders.

`python -m cuda_on_host.element_wise`, in tests/, prints {case: digest} as JSON for the CPU kernels.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator
from itertools import repeat

import torch
from onepass.optim import SGD, Lookahead, clip_grad_value_
from reference.common import name
from rules import RULES, Rule
from sparse import SPARSE, Sparse, some_rows
from support import DTYPES, bits, parameter

# Sizes around a pack, a warp, a round of a block and the smallest chunks in csrc/cuda/tuning.hpp.
SIZES = (0, 1, 3, 4, 7, 8, 9, 31, 33, 0, 255, 257, 1023, 4099, 8191, 8192, 8193, 3 * 8192 + 5)
MANY = tuple(i % 5 for i in range(1500))  # more than fit in one launch
LARGE = (3 << 20, 4095, 0, (1 << 20) + 1, 4097, 1)  # in all so many that chunks are larger
SPECIAL = torch.tensor([0.0, -0.0, 1, -1.5, math.nan, math.inf, -math.inf, 1e20, -1e30, 1e-20, 1e-40, -1e-44, 3e38])
STEPS = 3
# The formats of states and parameters, by the dtypes that take them.
FORMATS = {
    "bfloat16": ({"state_dtype": torch.bfloat16}, (torch.float32, torch.bfloat16, torch.float16)),
    "8bit": ({"state_dtype": "8bit"}, (torch.float32, torch.bfloat16, torch.float16)),
    "master 32": ({"state_dtype": "8bit", "master_bits": 32}, (torch.bfloat16,)),
    "master 24": ({"state_dtype": torch.bfloat16, "master_bits": 24}, (torch.bfloat16,)),
    "stochastic": ({"stochastic_rounding": True}, (torch.bfloat16,)),
}
GRAD_SCALE = 3.0  # its reciprocal is inexact


def drawn(sizes: Iterable[int], dtype: torch.dtype, offset: int = 0) -> Iterator[list[torch.Tensor]]:
    """Yield random lists of tensors without end. With an offset of 1 none is aligned."""
    torch.manual_seed(1)
    while True:
        yield [torch.randn(n + offset).to(dtype)[offset:] for n in sizes]


def special(dtype: torch.dtype) -> Iterator[list[torch.Tensor]]:
    """Every special parameter with every special gradient, in each step."""
    w, g = (values.flatten().to(dtype) for values in torch.meshgrid(SPECIAL, SPECIAL, indexing="ij"))
    yield [w]
    yield from repeat([g])


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """A digest of the bits in which all NaNs are equal, because their payload depends on the processor."""
    total = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().cpu()
        if not tensor.is_floating_point() and not tensor.is_complex():
            total.update(bits(tensor))
            continue
        total.update(bits(torch.where(tensor.isnan(), torch.full_like(tensor, math.nan), tensor)))
    return total.hexdigest()[:16]


def stepped(rule: Rule, case: dict, values: Iterator[list[torch.Tensor]], device: torch.device) -> str:
    """Step parameters made from the first values with gradients made from the following ones."""
    params = [parameter(p.to(device)) for p in next(values)]
    optimizer = rule.ours(params, **case)
    if case.get("fused_unscale"):
        optimizer.grad_scale = torch.tensor(GRAD_SCALE, device=device)
        optimizer.found_inf = torch.tensor(0.0, device=device)
    for step in range(STEPS):
        for i, (p, g) in enumerate(zip(params, next(values), strict=True)):
            p.grad = None if (i + step) % 7 == 6 else g.to(device)  # makes step counts differ
        optimizer.step()
    return digest(tensor for p in params for tensor in (p, *optimizer.state.get(p, {}).values()))


def rows_stepped(rule: Sparse, dtype: torch.dtype, device: torch.device) -> str:
    """Step tables whose rows have one element, several, and more than a chunk."""
    torch.manual_seed(2)
    shapes = [(50, 1), (40, 7), (30, 64), (3, 8200)]
    params = [parameter(torch.randn(shape).to(device, dtype)) for shape in shapes]
    optimizer = rule.ours(params, **rule.usual)
    for _ in range(STEPS):
        for p, shape in zip(params, shapes, strict=True):
            p.grad = some_rows(shape, shape[0] // 2 + 1, dtype, device).coalesce()
        optimizer.step()
    states = (state for p in params for state in optimizer.state.get(p, {}).values())
    return digest([*params, *states])


def formats_stepped(device: torch.device) -> dict[str, str]:
    """Every format of every rule that takes it, with scalars of the host and of the device."""
    found = {}
    for key, rule in RULES.items():
        usual = {**rule.usual, **({"centered": False} if "centered" in rule.usual else {})}
        for format_, (options, dtypes) in FORMATS.items():
            for dtype in dtypes:
                case = {**usual, **options}
                try:
                    rule.ours([parameter(torch.zeros(1))], **case)
                except (ValueError, TypeError):  # the rule needs more digits, or has no formats
                    continue
                what = f"{key}, {dtype}, {format_}"
                found[what] = stepped(rule, case, drawn(SIZES, dtype), device)
                found[f"{what}, unaligned"] = stepped(rule, case, drawn(SIZES, dtype, offset=1), device)
                found[f"{what}, special values"] = stepped(rule, case, special(dtype), device)
                if key == "AdamW":  # the engine's business, the same for every rule
                    found[f"{what}, many tensors"] = stepped(rule, case, drawn(MANY, dtype), device)
                    unscaled = {**case, "fused_unscale": True}
                    found[f"{what}, fused_unscale"] = stepped(rule, unscaled, drawn(SIZES, dtype), device)
                    if dtype is dtypes[0]:
                        found[f"{what}, large chunks"] = stepped(rule, case, drawn(LARGE, dtype), device)
    return found


def digests(device: torch.device) -> dict[str, str]:
    found = formats_stepped(device)
    for dtype in DTYPES:
        for key, rule in RULES.items():
            for case in rule.cases:
                if case["max_norm"] is not None or case["normalize_grads"]:
                    continue
                what = f"{key} {name(case, rule.options)}, {dtype}"
                found[what] = stepped(rule, case, drawn(SIZES, dtype), device)
                found[f"{what}, unaligned"] = stepped(rule, case, drawn(SIZES, dtype, offset=1), device)
            found[f"{key}, {dtype}, many tensors"] = stepped(rule, rule.usual, drawn(MANY, dtype), device)
            found[f"{key}, {dtype}, special values"] = stepped(rule, rule.usual, special(dtype), device)
        for offset in (0, 1):
            params = [parameter(p.to(device)) for p in next(drawn(SIZES, dtype, offset)) + next(special(dtype))]
            optimizer = Lookahead(SGD(params, lr=0.1), 2, 0.3)
            for values in (drawn(SIZES, dtype, offset + 2), drawn(SIZES, dtype)):
                for p, g in zip(params, next(values), strict=False):
                    p.grad = g[-p.numel() :].to(device) if p.numel() else torch.zeros_like(p)
                optimizer.step()
            slow = [optimizer.state[p]["slow_param"] for p in params]
            found[f"Lookahead, {dtype}, offset {offset}"] = digest([*params, *slow])
        for key, sparse_rule in SPARSE.items():
            found[f"{key}, {dtype}, rows"] = rows_stepped(sparse_rule, dtype, device)
        clipped = [parameter(values.to(device)) for values in next(drawn(SIZES, dtype, 1)) + next(special(dtype))]
        for p in clipped:
            p.grad = p.detach().clone()
        clip_grad_value_(clipped, 0.3)
        found[f"clip_grad_value_, {dtype}"] = digest(p.grad for p in clipped)
    return found


if __name__ == "__main__":
    json.dump(digests(torch.device("cpu")), sys.stdout)
