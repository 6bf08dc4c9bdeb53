"""Sparse gradients, the optimizers that accept them, and a reference for the rows they update."""

from dataclasses import dataclass

import numpy as np
import onepass
import torch
from reference import adagrad, sgd, sparse_adam
from reference.common import Reference
from support import ARITHMETIC, arithmetic_dtype, assert_close, rounding, to_numpy

torch.sparse.check_sparse_tensor_invariants.disable()  # explicit, otherwise torch warns that it does not check


@dataclass(frozen=True)
class Sparse:
    ours: type[torch.optim.Optimizer]
    theirs: type[torch.optim.Optimizer]
    reference: type[Reference]
    usual: dict


SPARSE = {
    "SGD": Sparse(onepass.optim.SGD, torch.optim.SGD, sgd.SGD, {"lr": 0.1}),
    "Adagrad": Sparse(
        onepass.optim.Adagrad, torch.optim.Adagrad, adagrad.Adagrad, {"lr": 0.1, "eps": 1e-4, "lr_decay": 0.1}
    ),
    "SparseAdam": Sparse(
        onepass.optim.SparseAdam, torch.optim.SparseAdam, sparse_adam.SparseAdam, {"lr": 0.1, "eps": 1e-4}
    ),
}


def sparse(shape, rows: list[int], dtype=torch.float32, device="cpu") -> torch.Tensor:
    """A gradient with a random row per number; a row may occur several times."""
    index = torch.tensor([rows], dtype=torch.int64, device=device)
    values = torch.randn(len(rows), *shape[1:], device=device).to(dtype)
    return torch.sparse_coo_tensor(index, values, shape)


def some_rows(shape, n: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return sparse(shape, torch.randint(shape[0], (n,)).tolist(), dtype, device)


class Beside:
    """An optimizer beside a reference that receives the updated rows of a table as if they were the whole table."""

    def __init__(self, rule: Sparse, case: dict, params: list[torch.nn.Parameter]) -> None:
        self.params, self.optimizer = params, rule.ours(params, **case)
        self.tables = [to_numpy(p) for p in params]
        self.states: list[dict] = [{} for _ in params]
        self.reference = rule.reference(**case)

    def step(self, grads: list[torch.Tensor | None], grad_scale: float | None = None) -> None:
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g
        if grad_scale is not None:
            self.optimizer.grad_scale = torch.tensor(grad_scale, device=self.params[0].device)
            self.optimizer.found_inf = torch.tensor(0.0, device=self.params[0].device)
        self.optimizer.step()
        rows, values = [], []
        for g in grads:
            dense = None if g is None else g.coalesce()
            rows.append(None if dense is None else dense.indices()[0].cpu().numpy())
            values.append(None if dense is None else to_numpy(dense.values()))
        parts = [None if r is None else table[r] for r, table in zip(rows, self.tables, strict=True)]
        for i, (table, r, state) in enumerate(zip(self.tables, rows, self.states, strict=True)):
            if r is not None and state:
                self.reference.state[i] = {k: v[r] if v.shape == table.shape else v for k, v in state.items()}
        self.reference.step(parts, values, grad_scale=grad_scale or 1.0)
        for i, (table, r, state) in enumerate(zip(self.tables, rows, self.states, strict=True)):
            if r is None:
                continue
            table[r] = parts[i]
            initial = self.reference.options.get("initial_accumulator_value", 0.0)
            for key, value in self.reference.state[i].items():
                if value.shape == parts[i].shape and value.shape != ():
                    state.setdefault(key, np.full_like(table, initial))[r] = value
                else:
                    state[key] = value
        self.compare()

    def compare(self) -> None:
        for i, (p, table, states) in enumerate(zip(self.params, self.tables, self.states, strict=True)):
            tolerance = ARITHMETIC[arithmetic_dtype(p.dtype)]
            assert_close(p, table, tolerance, f"parameter {i}", rounding(p.dtype))
            table[...] = to_numpy(p)
            came = self.optimizer.state.get(p, {})
            assert came.keys() == states.keys()
            for key, value in states.items():
                assert_close(came[key], value, tolerance, f"{key} of parameter {i}")
        if self.reference.grad_norm is not None:
            norm = self.optimizer.grad_norm
            assert_close(norm, self.reference.grad_norm, ARITHMETIC[norm.dtype], "norm")
