"""Layers and optimizers together in several processes (DDP, FSDP2, HSDP, ZeRO, checkpoints) equal one process."""

import copy
import tempfile

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

if dist.is_available():
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.nn.parallel import DistributedDataParallel

    try:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    except ImportError:
        pytest.skip("this torch has no public FSDP2 and DTensor", allow_module_level=True)

CLOSE = 1e-6
BATCH = 8


def make_model() -> torch.nn.Module:
    """Every norm over rows, between layers of sizes that no number of processes divides."""
    torch.manual_seed(0)
    nn = onepass.nn
    return torch.nn.Sequential(
        torch.nn.Linear(5, 7), nn.LayerNorm(7), torch.nn.Tanh(), torch.nn.Linear(7, 3), nn.RMSNorm(3), nn.Dropout(0.0)
    ).double()


def batch(step: int, rank: int | None = None) -> torch.Tensor:
    """A batch of all processes, or this process's share of it."""
    x = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x if rank is None else x.chunk(dist.get_world_size())[rank]


def loss(model, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - 1).square().mean()


def train(model, optimizer, steps: range, alone: bool = False) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(model, batch(step, None if alone else dist.get_rank())).backward()
        optimizer.step()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_equal(model, twin, what: str) -> None:
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(whole(p), q, CLOSE, f"{name}, {what}")


def adamw(params, **kwargs):
    return onepass.optim.AdamW(params, lr=0.02, weight_decay=0.1, **kwargs)


def ddp() -> None:
    """Gradients are views into buckets; two micro-batches, the first without synchronisation; clipped in the step."""
    for kwargs in ({}, {"max_norm": 0.1}):
        model, twin = make_model(), make_model()
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
        optimizer, other = adamw(parallel.parameters(), **kwargs), adamw(twin.parameters(), **kwargs)
        for step in range(4):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            with parallel.no_sync():
                loss(parallel, batch(2 * step, dist.get_rank())).backward()
            loss(parallel, batch(2 * step + 1, dist.get_rank())).backward()
            optimizer.step()
            other.zero_grad()
            (loss(twin, batch(2 * step)) + loss(twin, batch(2 * step + 1))).backward()
            other.step()
        assert_equal(model, twin, f"DDP {kwargs}")


def fsdp() -> None:
    """Uneven shards of every parameter, norms included."""
    for kwargs in ({}, {"max_norm": 0.1}):
        model, twin = make_model(), make_model()
        for layer in (model[0], model[3]):
            fully_shard(layer)
        fully_shard(model)
        optimizer, other = adamw(model.parameters(), **kwargs), adamw(twin.parameters(), **kwargs)
        train(model, optimizer, range(4))
        train(twin, other, range(4), alone=True)
        assert_equal(model, twin, f"FSDP2 {kwargs}")
        if kwargs:
            assert_close(optimizer.grad_norm, other.grad_norm, CLOSE, "the norm of all shards")


def mixed_parameters() -> None:
    """One optimizer over DTensors and plain parameters."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    values = torch.randn(3, 5, 3, dtype=torch.float64)
    grads = torch.randn(4, 3, 5, 3, dtype=torch.float64)
    params = [
        torch.nn.Parameter(t)
        for t in (
            distribute_tensor(values[0], mesh, [Shard(0)]),
            values[1].clone(),
            distribute_tensor(values[2], mesh, [Replicate()]),
        )
    ]
    twins = [torch.nn.Parameter(t.clone()) for t in values]
    optimizer, other = adamw(params), adamw(twins)
    for step in grads:
        for p, q, g in zip(params, twins, step, strict=True):
            p.grad = distribute_tensor(g, mesh, p.placements) if isinstance(p, DTensor) else g.clone()
            q.grad = g.clone()
        optimizer.step()
        other.step()
    for i, (p, q) in enumerate(zip(params, twins, strict=True)):
        assert_close(whole(p), q, CLOSE, f"parameter {i}")


def zero_redundancy() -> None:
    """Each process updates some parameters and broadcasts them; the consolidated state is that of one process."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # the import warns

    model, twin = make_model(), make_model()
    parallel = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(parallel.parameters(), onepass.optim.AdamW, lr=0.02, weight_decay=0.1)
    other = adamw(twin.parameters())
    train(parallel, optimizer, range(4))
    train(twin, other, range(4), alone=True)
    assert_equal(model, twin, "ZeroRedundancyOptimizer")
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        state, expected = optimizer.state_dict()["state"], other.state_dict()["state"]
        assert state.keys() == expected.keys()
        for i, states in expected.items():
            for name, value in states.items():
                assert_close(state[i][name], value, CLOSE, f"{name} of parameter {i}")


def nan_in_one_rank() -> None:
    """With max_norm every process gets the same result: NaN everywhere, as in one process."""
    model, twin = make_model(), make_model()
    fully_shard(model)
    optimizer, other = adamw(model.parameters(), max_norm=1.0), adamw(twin.parameters(), max_norm=1.0)
    x = batch(0, dist.get_rank()).clone()
    if dist.get_rank() == 1:
        x[0, 0] = float("nan")
    loss(model, x).backward()
    optimizer.step()
    loss(twin, batch(0) * float("nan")).backward()
    other.step()
    norms = [torch.empty((), dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(norms, optimizer.grad_norm)
    assert all(norm.isnan() for norm in norms), norms
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(whole(p).isnan(), q.isnan()), name


def hsdp() -> None:
    """Replicated along one dimension of the mesh, sharded along the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    for kwargs in ({}, {"max_norm": 0.1}):
        model, twin = make_model(), make_model()
        fully_shard(model, mesh=mesh)
        optimizer, other = adamw(model.parameters(), **kwargs), adamw(twin.parameters(), **kwargs)
        train(model, optimizer, range(4))
        train(twin, other, range(4), alone=True)
        assert_equal(model, twin, f"HSDP {kwargs}")
        for name, p in model.named_parameters():
            copies = [torch.empty_like(whole(p)) for _ in range(4)]
            dist.all_gather(copies, whole(p).detach().contiguous())
            assert len({bits(copy) for copy in copies}) == 1, f"{name} differs between processes"


# ---- checkpoints between different numbers of processes ---------------------------------------------------------------


class Checkpoint:
    """Saved by some processes and loaded by others, which continue as one process does."""

    def __init__(self, folder: str, saves: bool) -> None:
        self.folder, self.saves = folder, saves

    def __call__(self) -> None:
        model = make_model()
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        optimizer = adamw(model.parameters())
        if self.saves:
            train(model, optimizer, range(3))
            content = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
            dcp.save(content, checkpoint_id=self.folder)
            return
        content = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
        dcp.load(content, checkpoint_id=self.folder)
        model.load_state_dict(content["model"])
        set_optimizer_state_dict(model, optimizer, content["optim"])
        train(model, optimizer, range(3, 6))
        twin = make_model()
        other = adamw(twin.parameters())
        train(twin, other, range(6), alone=True)
        assert_equal(model, twin, f"a checkpoint of 2 processes, loaded by {dist.get_world_size()}")


class All:
    """Several parts in one group of processes, because starting them takes longer than the work."""

    def __init__(self, *parts) -> None:
        self.parts = parts

    def __call__(self) -> None:
        for part in self.parts:
            try:
                part()
            except BaseException as error:
                name = getattr(part, "__name__", type(part).__name__)
                raise AssertionError(f"in {name}: {error}") from error


def test_one_two_and_four_processes():
    with tempfile.TemporaryDirectory() as folder:
        run(2, All(ddp, fsdp, mixed_parameters, zero_redundancy, nan_in_one_rank, Checkpoint(folder, saves=True)))
        run(4, All(ddp, hsdp, Checkpoint(folder, saves=False)))
        run(1, Checkpoint(folder, saves=False))


def test_one_process_agrees_with_torch():
    """The single process that the others are compared with gives torch's result."""
    ours = make_model()
    theirs = copy.deepcopy(ours)
    for i, kind in ((1, torch.nn.LayerNorm), (4, torch.nn.RMSNorm), (5, torch.nn.Dropout)):
        theirs[i].__class__ = kind
    train(ours, adamw(ours.parameters()), range(4), alone=True)
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=0.02, weight_decay=0.1), range(4), alone=True)
    assert_equal(ours, theirs, "one process")
