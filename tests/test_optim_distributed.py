"""Several processes and sharded tensors: DTensor, FSDP2, distributed checkpoints, Hogwild."""

import contextlib
import copy
import tempfile

import onepass
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import run
from rules import RULES
from support import assert_close

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
    pytest.mark.filterwarnings("ignore"),  # torch's own deprecation warnings
]

fully_shard = None
if dist.is_available():
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh

    try:
        from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    except ImportError:  # the name in older torch
        from torch.distributed._tensor import DTensor, Replicate, Shard, distribute_tensor
    with contextlib.suppress(ImportError):  # older torch has a private one for GPUs only
        from torch.distributed.fsdp import fully_shard

needs_fully_shard = pytest.mark.skipif(fully_shard is None, reason="this torch has no public fully_shard")

OPTIMIZERS: dict[str, tuple[type, type, dict]] = {
    name: (rule.ours, rule.theirs, {**rule.usual, "lr": 0.01}) for name, rule in RULES.items()
}


def make_model() -> torch.nn.Module:
    """Sizes that 2 does not divide: shards are uneven, and one rank has nothing of the bias of size 1."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)).double()


def train(model, optimizer, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_training(model, optimizer, twin, theirs, what: str) -> None:
    """Assert that gathered parameters and states are those of the unsharded model under torch.optim."""
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(whole(p), q, 1e-12, f"{name} under {what}")
        assert optimizer.state[p].keys() == theirs.state[q].keys(), f"states of {name} under {what}"
        for key, value in theirs.state[q].items():
            came = optimizer.state[p][key]
            assert isinstance(came, DTensor) == (isinstance(p, DTensor) and key not in optimizer.scalar_states), (
                f"{key} of {name}: {type(came)}"
            )
            assert_close(whole(came), value, 1e-12, f"{key} of {name} under {what}")


# ---- what the processes do -------------------------------------------------------------------------------------------


def states_in_other_formats() -> None:
    """Shards train like the whole, but for the rounding; their states are saved as float32, for any number of processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    weights, grads = torch.randn(301, 5), [torch.randn(301, 5) for _ in range(4)]
    for options in (
        {"state_dtype": torch.bfloat16},
        {"state_dtype": "8bit"},
        {"state_dtype": "8bit", "master_bits": 32},
        {"stochastic_rounding": True},
    ):
        dtype = torch.float32 if set(options) == {"state_dtype"} else torch.bfloat16

        def shard(tensor: torch.Tensor) -> torch.nn.Parameter:
            return torch.nn.Parameter(distribute_tensor(tensor.clone(), mesh, [Shard(0)]))

        single = torch.nn.Parameter(weights.to(dtype))
        sharded = shard(single.detach())
        pair = [OPTIMIZERS["AdamW"][0]([p], lr=0.01, **options) for p in (single, sharded)]
        for grad in grads:
            single.grad = grad.to(dtype)
            sharded.grad = distribute_tensor(grad.to(dtype), mesh, [Shard(0)])
            for optimizer in pair:
                optimizer.step()
        torch.testing.assert_close(whole(sharded.detach()), single.detach(), rtol=0.05, atol=0.03)
        saved = pair[1].state_dict()["state"][0]
        assert not any("codes" in name or "scale" in name for name in saved)
        assert (saved["exp_avg"].dtype == torch.bfloat16) == (options.get("state_dtype") is torch.bfloat16)
        expected = onepass.optim.full_state_dict(pair[0])["state"][0]["exp_avg"]
        torch.testing.assert_close(whole(saved["exp_avg"]).float(), expected, rtol=0.3, atol=0.06)

        again = OPTIMIZERS["AdamW"][0]([shard(whole(sharded.detach()))], lr=0.01, **options)
        again.load_state_dict(copy.deepcopy(pair[1].state_dict()))
        restored = again.state_dict()["state"][0]
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(whole(restored[name]), whole(saved[name]), rtol=0.01, atol=2e-5)
        (loaded,) = again.param_groups[0]["params"]
        loaded.grad = sharded.grad
        again.step()
        pair[1].step()
        torch.testing.assert_close(whole(loaded.detach()), whole(sharded.detach()), rtol=1e-2, atol=1e-5)


def sharded_and_replicated() -> None:
    """DTensor parameters as in tensor parallelism; gradients may have another placement."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for ours, theirs, kwargs in OPTIMIZERS.values():
        torch.manual_seed(0)
        full = [torch.randn(5, 3, dtype=torch.float64) for _ in range(3)]
        placements = [[Shard(0)], [Shard(1)], [Replicate()]]
        params = [torch.nn.Parameter(distribute_tensor(w, mesh, pl)) for w, pl in zip(full, placements, strict=True)]
        twins = [torch.nn.Parameter(w.clone()) for w in full]
        optimizer, other = ours(params, **kwargs), theirs(twins, **kwargs)
        for t in range(4):
            for i, (p, q) in enumerate(zip(params, twins, strict=True)):
                q.grad = torch.randn(5, 3, dtype=torch.float64)
                p.grad = distribute_tensor(q.grad, mesh, placements[(i + t) % 3])
            optimizer.step()
            other.step()
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            assert p.placements == tuple(placements[i])
            assert_close(whole(p), q, 1e-12, f"parameter placed {placements[i]} under {ours.__name__}")


def fsdp_and_checkpoint() -> None:
    """fully_shard with uneven shards; a checkpoint from mid-training, loaded into a new model, continues equally."""
    for name, (ours, theirs, kwargs) in OPTIMIZERS.items():
        twin, model = make_model(), make_model()
        fully_shard(model)
        optimizer, other = ours(model.parameters(), **kwargs), theirs(twin.parameters(), **kwargs)
        train(model, optimizer, 3)
        train(twin, other, 3)
        assert_same_training(model, optimizer, twin, other, f"FSDP2 with {name}")

        fresh = make_model()
        fully_shard(fresh)
        again = ours(fresh.parameters(), **kwargs)
        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(folder)
        dcp.save(
            {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder[0]
        )
        before = {key: whole(p).detach().clone() for key, p in fresh.named_parameters()}
        content = {"model": fresh.state_dict(), "optim": get_optimizer_state_dict(fresh, again)}
        for key, p in fresh.named_parameters():
            assert_close(whole(p), before[key], 0.0, f"{key} after the checkpoint's step of zero gradients")
        dcp.load(content, checkpoint_id=folder[0])
        fresh.load_state_dict(content["model"])
        set_optimizer_state_dict(fresh, again, content["optim"])
        train(fresh, again, 3, seed=2)
        train(twin, other, 3, seed=2)
        assert_same_training(fresh, again, twin, other, f"FSDP2 with {name}, resumed")


def clip_plain(optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.01)


def clipped_shards() -> None:
    """The global norm of shards needs every rank: fused clipping is either refused or right, never by a local norm."""
    for ours, theirs, kwargs in OPTIMIZERS.values():
        twin, model = make_model(), make_model()
        fully_shard(model)
        try:
            optimizer = ours(model.parameters(), max_norm=0.01, **kwargs)
            train(model, optimizer, 1)
        except (RuntimeError, NotImplementedError) as error:
            assert "max_norm" in str(error), f"the error should say max_norm: {error}"  # noqa: PT017
            continue
        other = theirs(twin.parameters(), **kwargs)
        other.register_step_pre_hook(lambda o, *_: clip_plain(o))
        train(twin, other, 1)
        assert_same_training(model, optimizer, twin, other, "FSDP2 and max_norm")


def ddp() -> None:
    """Gradients are views into DDP's buckets, with the alignment of a single element."""
    for name, (ours, theirs, kwargs) in OPTIMIZERS.items():
        twin, model = make_model(), make_model()
        parallel = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        optimizer, other = ours(parallel.parameters(), **kwargs), theirs(twin.parameters(), **kwargs)
        train(parallel, optimizer, 4)
        train(twin, other, 4)
        assert_same_training(model, optimizer, twin, other, f"DDP with {name}")


def all_of_it() -> None:
    sharded_and_replicated()
    ddp()
    if fully_shard is not None:
        fsdp_and_checkpoint()
        clipped_shards()


# ---- tests -----------------------------------------------------------------------------------------------------------


SHARDING = [pytest.param(work, marks=needs_fully_shard) for work in (fsdp_and_checkpoint, clipped_shards)]


@pytest.mark.parametrize("work", [sharded_and_replicated, *SHARDING, ddp])
def test_one_process(work):
    run(1, work)


def test_two_processes():
    """Everything in one pair of processes, because starting them takes longer than the work."""
    run(2, all_of_it)


def hogwild(rank: int, jobs: list[tuple]) -> None:
    """Each process has its own optimizers over the shared parameters and states, its own gradients, and one thread."""
    torch.set_num_threads(1)
    for optimizer_class, model, states in jobs:
        optimizer = optimizer_class(model.parameters(), lr=0.02)
        for p, state in zip(model.parameters(), states, strict=True):
            optimizer.state[p].update(state)
        generator = torch.Generator().manual_seed(rank)
        for _ in range(100):
            x = torch.randn(16, 4, generator=generator)
            optimizer.zero_grad()
            distance_from_sum(model, x).backward()
            optimizer.step()


def distance_from_sum(model, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def test_hogwild():
    """Two processes train shared models with shared states at once; both contribute and the loss falls."""
    x, jobs, before = torch.randn(64, 4), [], []
    for key in ("Adam", "SGD"):
        model = torch.nn.Linear(4, 1).share_memory()
        before.append(distance_from_sum(model, x).item())
        optimizer = OPTIMIZERS[key][0](model.parameters(), lr=0.02)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        states = [{k: v.share_memory_() for k, v in optimizer.state[p].items()} for p in model.parameters()]
        jobs.append((OPTIMIZERS[key][0], model, states))
    mp.spawn(hogwild, (jobs,), nprocs=2)
    for (optimizer_class, model, states), start in zip(jobs, before, strict=True):
        after = distance_from_sum(model, x).item()
        assert after < 0.5 * start, f"{optimizer_class.__name__}: the loss was {start}, is {after}"
        for state in states:
            # Counts are shared without a lock; a single process would reach 101.
            assert 101 < state.get("step", 150) <= 201, f"between 101 and 201 steps expected, came {state['step']}"


@pytest.mark.parametrize("processes", [2, 3])
def test_states_in_other_formats(processes):
    run(processes, states_in_other_formats)
