"""SAM and Lookahead in several processes: one norm over all shards, distributed checkpoints, no_sync()."""

import copy
import tempfile

import onepass
import pytest
import torch
import torch.distributed as dist
from onepass.optim import SAM, SGD, Adam, Lookahead
from processes import run
from support import assert_close
from test_optim_distributed import fully_shard, make_model, needs_fully_shard, pytestmark, whole  # noqa: F401
from test_optim_sam import recipe

if dist.is_available():
    import torch.distributed.checkpoint as dcp
    from test_optim_distributed import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh


def train(model, optimizer, steps: int, seed: int = 1, own_batch: bool = False) -> None:
    """Train with a closure, which both wrappers accept."""
    generator = torch.Generator().manual_seed(seed + (100 * dist.get_rank() if own_batch else 0))
    for _ in range(steps):
        x = torch.randn(4, 5, generator=generator, dtype=torch.float64)

        def closure(x=x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


WRAPPED = {
    "SAM": lambda params: SAM(params, SGD, rho=0.5, lr=0.05, momentum=0.9),
    "ASAM": lambda params: SAM(params, torch.optim.Adam, rho=0.5, adaptive=True, lr=0.01),
    "Lookahead": lambda params: Lookahead(Adam(params, lr=0.05), 2, 0.3),
    "quadratic": lambda params: Lookahead(torch.optim.SGD(params, lr=0.4), 2, "quadratic"),
}


def assert_equal(model, optimizer, twin, other, what: str) -> None:
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(whole(p), q, 1e-12, f"{name} under {what}")
        assert optimizer.state[p].keys() == other.state[q].keys(), f"states of {name} under {what}"
        for key, value in other.state[q].items():
            assert_close(whole(optimizer.state[p][key]), value, 1e-12, f"{key} of {name} under {what}")


def sharded() -> None:
    """FSDP2 with uneven shards against the unsharded model, and resumed from a distributed checkpoint."""
    for name, wrap in WRAPPED.items():
        twin, model = make_model(), make_model()
        fully_shard(model)
        optimizer, other = wrap(model.parameters()), wrap(twin.parameters())
        train(model, optimizer, 5)
        train(twin, other, 5)
        assert_equal(model, optimizer, twin, other, name)
        if isinstance(optimizer, Lookahead):
            assert isinstance(optimizer.state[next(model.parameters())]["slow_param"], DTensor)

        fresh = make_model()
        fully_shard(fresh)
        again = wrap(fresh.parameters())
        if name == "quadratic":  # DCP does this for other optimizers: a step that creates the states
            train(fresh, again, 1)
        # SAM keeps no state between steps, and DCP's own first step has no closure.
        saved, loaded = (o.base_optimizer if isinstance(o, SAM) else o for o in (optimizer, again))
        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(folder)
        content = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, saved)}
        dcp.save(content, checkpoint_id=folder[0])
        content = {"model": fresh.state_dict(), "optim": get_optimizer_state_dict(fresh, loaded)}
        dcp.load(content, checkpoint_id=folder[0])
        fresh.load_state_dict(content["model"])
        set_optimizer_state_dict(fresh, loaded, content["optim"])
        train(fresh, again, 3, seed=2)
        train(twin, other, 3, seed=2)
        assert_equal(fresh, again, twin, other, f"{name}, resumed")
        if isinstance(again, Lookahead):
            assert again.param_groups[0]["lookahead_step"] == 8


def tensor_parallel() -> None:
    """Parameters sharded along other dimensions; if they are not sharded alike, they are refused and nothing changes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    for placements in ([[Shard(0)], [Shard(1)]], [[Replicate()], [Replicate()]], [[Shard(0)], [Replicate()]]):
        values = [torch.randn(5, 3, dtype=torch.float64) for _ in placements]
        grads = [torch.randn(5, 3, dtype=torch.float64) for _ in placements]
        params = [torch.nn.Parameter(distribute_tensor(w, mesh, pl)) for w, pl in zip(values, placements, strict=True)]
        twins = [torch.nn.Parameter(w.clone()) for w in values]
        optimizer, other = SAM(params, SGD, rho=0.5, lr=0.1), SAM(twins, SGD, rho=0.5, lr=0.1)
        for p, q, g, pl in zip(params, twins, grads, placements, strict=True):
            p.grad, q.grad = distribute_tensor(g, mesh, pl), g
        if placements[0] == [Shard(0)] and placements[1] == [Replicate()]:
            with pytest.raises(RuntimeError, match="SAM needs all parameters sharded alike"):
                optimizer.first_step()
            assert not optimizer.is_perturbed
            for p, w in zip(params, values, strict=True):
                assert_close(whole(p), w, 0.0, "after the error")
            continue
        for o in (optimizer, other):
            o.first_step()
        for p, q in zip(params, twins, strict=True):
            assert_close(whole(p), q, 1e-12, f"perturbed, placed {placements}")
        for o in (optimizer, other):
            o.second_step()
        for p, q in zip(params, twins, strict=True):
            assert_close(whole(p), q, 1e-12, f"stepped, placed {placements}")


def ddp() -> None:
    """Both gradients are averaged: the same as one process with the whole batch, for both wrappers."""
    for name, wrap in WRAPPED.items():
        model = make_model()
        parallel = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        twin = make_model()
        optimizer, other = wrap(parallel.parameters()), wrap(twin.parameters())
        train(parallel, optimizer, 4)
        train(twin, other, 4)
        assert_equal(model, optimizer, twin, other, f"DDP with {name}")


def no_sync() -> None:
    """The page's recipe: each process perturbs by its own gradient, and the second gradients are averaged."""
    torch.manual_seed(dist.get_rank())
    x, target = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)
    model = make_model()
    twin = copy.deepcopy(model)
    space = {"torch": torch, "onepass": onepass, "loader": [(x, target)] * 3, "loss_fn": torch.nn.functional.mse_loss}
    space["model"] = torch.nn.parallel.DistributedDataParallel(model)
    exec(recipe("DistributedDataParallel"), space)

    params = list(twin.parameters())
    for _ in range(3):
        grads = torch.autograd.grad(torch.nn.functional.mse_loss(twin(x), target), params)
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt() + 1e-12
        there = copy.deepcopy(twin)
        with torch.no_grad():
            for p, g in zip(there.parameters(), grads, strict=True):
                p += 0.05 * g / norm
        second = torch.autograd.grad(torch.nn.functional.mse_loss(there(x), target), list(there.parameters()))
        with torch.no_grad():
            for p, g in zip(params, second, strict=True):
                dist.all_reduce(g)
                p -= 0.1 * g / dist.get_world_size()
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert_close(p, q[1], 1e-12, name)


def all_of_it() -> None:
    tensor_parallel()
    ddp()
    no_sync()
    if fully_shard is not None:
        sharded()


@pytest.mark.parametrize("work", [pytest.param(sharded, marks=needs_fully_shard), tensor_parallel, ddp, no_sync])
def test_one_process(work):
    run(1, work)


def test_two_processes():
    run(2, all_of_it)
