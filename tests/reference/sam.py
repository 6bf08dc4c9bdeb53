"""SAM (Foret et al. 2021) and ASAM (Kwon et al. 2021) around a rule."""

from collections.abc import Callable

import numpy as np

from .common import Array, Reference, total_norm


class SAM:
    """rhos[i] replaces rho for parameter i, as a param group does; the norm is that of all parameters."""

    def __init__(
        self, inner: Reference, rho: float = 0.05, adaptive: bool = False, rhos: dict[int, float] | None = None
    ) -> None:
        self.inner, self.rho, self.adaptive, self.rhos = inner, rho, adaptive, rhos or {}

    def perturbed(self, params: list[Array], grads: list[Array | None]) -> list[Array]:
        """w + e, for every parameter that has a gradient."""
        with np.errstate(all="ignore"):
            sized = [
                None if g is None else np.abs(w) * g if self.adaptive else g for w, g in zip(params, grads, strict=True)
            ]
            norm = total_norm(sized) + 1e-12
            return [
                w.copy() if g is None else w + self.rhos.get(i, self.rho) * (w**2 if self.adaptive else 1) * g / norm
                for i, (w, g) in enumerate(zip(params, grads, strict=True))
            ]

    def step(self, params: list[Array], gradients: Callable[[list[Array]], list[Array | None]]) -> None:
        self.inner.step(params, gradients(self.perturbed(params, gradients(params))))
