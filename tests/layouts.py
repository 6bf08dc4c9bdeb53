"""Tensors that are not dense and aligned, each inside a larger base whose other elements must not change."""

from collections.abc import Callable

import torch

FILL = 7.0
Maker = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _full(shape, **kwargs) -> torch.Tensor:
    return torch.full(shape, FILL, **kwargs)


def contiguous(shape, **kwargs):
    base = _full(shape, **kwargs)
    return base, base


def offset_by_one(shape, **kwargs):
    base = _full([torch.Size(shape).numel() + 2], **kwargs)
    return base, base[1:-1].view(shape)


def transposed(shape, **kwargs):
    base = _full(shape[::-1], **kwargs)
    return base, base.permute(*reversed(range(len(shape))))


def every_second_column(shape, **kwargs):
    base = _full([*shape[:-1], 2 * shape[-1] + 1], **kwargs)
    return base, base[..., 1::2]


def inner_rows(shape, **kwargs):
    base = _full([shape[0], shape[1] + 2, *shape[2:]], **kwargs)
    return base, base[:, 1:-1]


def channels_last(shape, **kwargs):
    base = _full(shape, **kwargs).to(memory_format=torch.channels_last)
    return base, base


def some_channels_last(shape, **kwargs):
    base = _full([shape[0], shape[1] + 2, *shape[2:]], **kwargs).to(memory_format=torch.channels_last)
    return base, base[:, 1:-1]


LAYOUTS: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (
        contiguous,
        offset_by_one,
        transposed,
        every_second_column,
        inner_rows,
        channels_last,
        some_channels_last,
    )
}


def in_layout(name: str, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The base and the view of it that holds the 4-d `values` in the named layout."""
    base, view = LAYOUTS[name](list(values.shape), dtype=values.dtype, device=values.device)
    view.copy_(values)
    return base, view


def assert_only_view_written(base: torch.Tensor, view: torch.Tensor, what: str) -> None:
    """Assert that nothing around the view changed. Overwrites the view."""
    with torch.no_grad():
        view.fill_(FILL)
        assert bool((base == FILL).all()), f"{what}: elements around the parameter were written"
