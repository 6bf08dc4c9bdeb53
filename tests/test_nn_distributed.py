"""SyncBatchNorm in two processes equals BatchNorm of the whole batch, however it is divided."""

import copy

import onepass
import pytest
import torch
import torch.distributed as dist
from processes import run
from support import assert_close, bits

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
    pytest.mark.filterwarnings("ignore"),  # torch's own deprecation warnings
]

CHANNELS = 5
# Numbers of samples of the two ranks. One rank may have none, or a single value.
PARTS = [(4, 4), (1, 6), (7, 2), (0, 5), (3, 0), (1, 1)]


def mine(whole: torch.Tensor, parts: tuple[int, int]) -> torch.Tensor:
    return whole.split(parts)[dist.get_rank()]


def summed(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor


def pair(**kwargs) -> tuple[torch.nn.Module, torch.nn.Module]:
    """SyncBatchNorm, and a BatchNorm that sees the whole batch."""
    torch.manual_seed(1)
    sync = onepass.nn.SyncBatchNorm(CHANNELS, **kwargs).double()
    whole = torch.nn.BatchNorm1d(CHANNELS, **kwargs).double()
    whole._check_input_dim = lambda x: None
    with torch.no_grad():
        for p in sync.parameters():
            p.normal_()
    whole.load_state_dict(sync.state_dict())
    return sync, whole


def assert_like_the_whole_batch(sync, whole, x, dy, parts, what: str) -> None:
    part, all_of_it = mine(x, parts).clone().requires_grad_(), x.clone().requires_grad_()
    for module in (sync, whole):
        module.zero_grad()
    y, expected = sync(part), whole(all_of_it)
    assert y.stride() == part.stride(), f"{what}: y has the strides {y.stride()}, x {part.stride()}"
    assert_close(y, mine(expected, parts), 1e-12, f"y, {what}")
    y.backward(mine(dy, parts))
    expected.backward(dy)
    assert_close(part.grad, mine(all_of_it.grad, parts), 1e-12, f"gradient of x, {what}")
    for (name, p), q in zip(sync.named_parameters(), whole.parameters(), strict=True):
        assert_close(summed(p.grad), q.grad, 1e-11, f"gradient of {name}, the sum over the ranks, {what}")
    for (name, b), c in zip(sync.named_buffers(), whole.buffers(), strict=True):
        assert_close(b, c, 1e-12, f"{name}, {what}")


def division() -> None:
    """Every division of a batch, in several shapes and formats, in training and then in evaluation."""
    torch.manual_seed(0)
    for parts in PARTS:
        for space in ((), (3,), (2, 3), (2, 2, 2)):
            x, dy = torch.randn(2, sum(parts), CHANNELS, *space, dtype=torch.float64)
            sync, whole = pair(momentum=None if space == (3,) else 0.2)
            for _ in range(2):
                assert_like_the_whole_batch(sync, whole, x, dy, parts, f"{parts}, {space}")
            for module in (sync, whole):
                module.eval()
            assert_like_the_whole_batch(sync, whole, x, dy, parts, f"{parts}, {space}, evaluation")


def options() -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(2, 6, CHANNELS, 2, 3, dtype=torch.float64)
    for kwargs in ({"affine": False}, {"track_running_stats": False}, {"eps": 0.1}):
        assert_like_the_whole_batch(*pair(**kwargs), x, dy, (4, 2), str(kwargs))
    for t in (x, dy):
        t.data = t.contiguous(memory_format=torch.channels_last)
    assert_like_the_whole_batch(*pair(), x, dy, (4, 2), "channels_last")


def large_mean() -> None:
    """1e4 + noise of 1e-2 in float32, in uneven parts: the deviation is right to 1e-3."""
    torch.manual_seed(0)
    x = 1e4 + 1e-2 * torch.randn(400, CHANNELS)
    sync = onepass.nn.SyncBatchNorm(CHANNELS, momentum=1.0, eps=1e-12)
    sync(mine(x, (30, 370)))
    expected = x.double().var(0).sqrt()
    assert_close(sync.running_var.double().sqrt() / expected, torch.ones(CHANNELS), 1e-3, "deviation")


def low_precision() -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(6, CHANNELS, 4).to(dtype)
        sync = onepass.nn.SyncBatchNorm(CHANNELS)
        part = mine(x, (4, 2)).clone().requires_grad_()
        y = sync(part)
        assert y.dtype == dtype
        expected = mine(torch.nn.functional.batch_norm(x.float(), None, None, training=True), (4, 2))
        assert_close(y, expected, 1e-5, f"{dtype}", torch.finfo(dtype).eps)
        y.float().square().sum().backward()
        assert part.grad.dtype == dtype
        assert sync.weight.grad.dtype == torch.float32


def averaged_gradients() -> None:
    """Gradients of the mean loss, averaged as DistributedDataParallel does, equal those of one process.

    (DistributedDataParallel itself refuses modules with a SyncBatchNorm on the CPU.)
    """

    def model():
        torch.manual_seed(3)
        layers = (
            torch.nn.Linear(4, CHANNELS),
            torch.nn.BatchNorm1d(CHANNELS),
            torch.nn.Tanh(),
            torch.nn.Linear(CHANNELS, 1),
        )
        return torch.nn.Sequential(*layers).double()

    whole, synced = model(), onepass.convert(torch.nn.SyncBatchNorm.convert_sync_batchnorm(model()))
    assert type(synced[1]) is onepass.nn.SyncBatchNorm
    x = torch.randn(8, 4, dtype=torch.float64)
    for _ in range(3):
        for m, batch in ((synced, mine(x, (4, 4))), (whole, x)):
            m.zero_grad()
            m(batch).square().mean().backward()
        for (name, p), q in zip(synced.named_parameters(), whole.parameters(), strict=True):
            assert_close(summed(p.grad) / 2, q.grad, 1e-12, name)
            with torch.no_grad():
                for parameter in (p, q):
                    parameter -= 0.1 * q.grad


def from_ours() -> None:
    """torch's convert_sync_batchnorm treats our BatchNorm as its base class; ours can be called the same way."""
    model = torch.nn.Sequential(onepass.nn.BatchNorm1d(CHANNELS), onepass.nn.BatchNorm2d(CHANNELS))
    weight = model[0].weight
    synced = onepass.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert [type(m) for m in synced] == [onepass.nn.SyncBatchNorm] * 2
    assert synced[0].weight is weight
    torch.manual_seed(dist.get_rank())
    synced[0](torch.randn(4, CHANNELS))
    means = [torch.empty(CHANNELS) for _ in range(2)]
    dist.all_gather(means, synced[0].running_mean)
    assert bits(means[0]) == bits(means[1]), "the ranks' statistics differ"


def with_activation() -> None:
    """A converted BatchNormAct, in every division: activation and residual as with BatchNorm of the whole batch."""
    torch.manual_seed(0)
    for parts in PARTS:
        for activation, slope in (("relu", 0.01), ("leaky_relu", 0.2), (None, 0.01)):
            for with_residual in (False, True):
                what = f"{parts}, {activation}, residual: {with_residual}"
                x, residual, dy = torch.randn(3, sum(parts), CHANNELS, 2, dtype=torch.float64)
                whole = onepass.nn.BatchNormAct1d(CHANNELS, activation=activation, negative_slope=slope).double()
                sync = onepass.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(whole))
                assert type(sync) is onepass.nn.SyncBatchNormAct
                results = []
                for module, cut in ((sync, lambda t: mine(t, parts)), (whole, lambda t: t)):  # noqa: B023
                    inputs = [cut(t).clone().requires_grad_() for t in ((x, residual) if with_residual else (x,))]
                    y = module(*inputs)
                    y.backward(cut(dy))
                    results.append([y, *(t.grad for t in inputs)])
                for i, (came, expected) in enumerate(zip(*results, strict=True)):
                    assert_close(came, mine(expected, parts), 1e-12, f"result {i}, {what}")
                for (name, p), q in zip(sync.named_parameters(), whole.parameters(), strict=True):
                    assert_close(summed(p.grad), q.grad, 1e-11, f"gradient of {name}, {what}")
                for (name, b), c in zip(sync.named_buffers(), whole.buffers(), strict=True):
                    assert_close(b, c, 1e-12, f"{name}, {what}")


def a_group_of_one() -> None:
    """A process group of one rank: nothing is exchanged with the other rank."""
    groups = [dist.new_group([rank]) for rank in range(2)]
    sync = onepass.nn.SyncBatchNorm(CHANNELS, process_group=groups[dist.get_rank()]).double()
    torch.manual_seed(dist.get_rank())
    x = torch.randn(3, CHANNELS, dtype=torch.float64)
    assert_close(sync(x), torch.nn.functional.batch_norm(x, None, None, training=True), 1e-12, "a group of one")


def work() -> None:
    """All parts in one pair of processes, because starting them takes longer than the work."""
    for part in (
        division,
        options,
        large_mean,
        low_precision,
        averaged_gradients,
        from_ours,
        with_activation,
        a_group_of_one,
    ):
        try:
            part()
        except BaseException as error:
            raise AssertionError(f"in {part.__name__}: {error}") from error


def test_two_processes():
    run(2, work)
