from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

cuda_archs: str
cuda_on_host: bool
compiler: str

def set_reader(exchange_api: object, describe: Callable[[Tensor], Any]) -> bool: ...
def rules() -> list[tuple[str, tuple[str, ...], tuple[str, ...], str | None, bool, bool]]: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(name: str) -> None: ...
def thread_runtime() -> str: ...
def cuda_device_count() -> int: ...

_Dropout = tuple[Tensor, float, bool, Tensor | None, bool] | None  # see bind_layers.hpp

def dropout(x: Tensor, y: Tensor | None, size: int, dropout: _Dropout, threads: int, stream: int) -> None: ...
def is_usual_norm(
    x: Tensor, normalized_shape: object, weight: Tensor | None, bias: Tensor | None, eps: object
) -> bool: ...
def row_norm(
    x: Tensor,
    residual: Tensor | None,
    sum: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    stats: Tensor | None,
    size: int,
    eps: float,
    rms: bool,
    dropout: _Dropout,
    threads: int,
    stream: int,
    room: object,
) -> None: ...
def row_norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor | None,
    dx: Tensor | None,
    dbranch: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    size: int,
    eps: float,
    rms: bool,
    dropout: _Dropout,
    threads: int,
    stream: int,
    room: object,
) -> None: ...
def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    stats: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    shape: tuple[int, int, int, bool],
    half: int,
    eps: float,
    momentum: float,
    slope: float | None,
    threads: int,
    stream: int,
    room: object,
) -> None: ...
def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    sums: Tensor | None,
    dx: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    shape: tuple[int, int, int, bool],
    half: int,
    training: bool,
    count: float,
    slope: float | None,
    threads: int,
    stream: int,
    room: object,
) -> None: ...

class Plan:
    def __init__(self, tensor_types: tuple[type, ...]) -> None: ...
    def gather(
        self,
        variant: int,
        params: Sequence[Tensor],
        state: dict[Tensor, Any],
        hyper: tuple[float | Tensor, ...],
        counts_steps: bool,
        device_scalars: bool,
        maximize: bool,
        fresh: set[Tensor] | None,
        mend: Callable[[int, Tensor, Tensor | None, list[Tensor], dict[str, Any]], list[Any]],
    ) -> list[int]: ...
    def has_subclasses(self) -> bool: ...
    def has_run(self) -> bool: ...
    def has_cpu(self) -> bool: ...
    def cpu_total(self, norm_type: float, weighted: bool, max_threads: int) -> float: ...
    def cuda_devices(self) -> list[int]: ...
    def cuda_partials(self, device: int) -> int: ...
    def cuda_total(
        self, norm_type: float, weighted: bool, device: int, partials: int, total: int, stream: int
    ) -> None: ...
    def run(
        self,
        max_threads: int,
        max_norm: float | None,
        normalize: bool,
        epsilon: float,
        norm: float,
        grad_scale: float,
        scaled_on_device: bool,
        on_device: Callable[[int, int], tuple[int, int, int, int, int, int]],
    ) -> None: ...
    def updated(self) -> list[Tensor]: ...
