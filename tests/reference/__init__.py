"""The truth of every update rule: float64 NumPy, one file a rule, straight from the formula and slow.

A reference is a class with an explicit `state` and `step(params, grads)`; beside it stand `OPTIONS` (each argument and
the values worth testing), `CASES` (all pairs of them), `PRODUCT` (all of them) and `to_torch(case)` (the arguments of
the same form in torch.optim, None where torch has none).
"""
