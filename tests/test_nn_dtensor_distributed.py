"""Layers on DTensors (sequence parallel, tensor parallel, replicated): values and gradients equal one process."""

import onepass
import pytest
import torch
import torch.distributed as dist
from onepass.nn import functional as OF
from processes import run
from support import assert_close, bits

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
    pytest.mark.filterwarnings("ignore"),  # torch's own deprecation warnings
]

if dist.is_available():
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
        from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
    except ImportError:
        pytest.skip("this torch has no public DTensor", allow_module_level=True)

EXACT = 1e-12
SHAPE = (3, 5, 6)  # 2 divides neither the batch nor the sequence


def mesh_of_all():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def leaf(tensor: torch.Tensor, mesh, placements) -> torch.Tensor:
    return distribute_tensor(tensor.detach().clone(), mesh, placements).requires_grad_()


def assert_gradient(came: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert isinstance(came, DTensor), f"{what}: a DTensor is expected, came {type(came)}"
    assert_close(came.full_tensor(), expected, EXACT, what)


# ---- norms -----------------------------------------------------------------------------------------------------------


def norms() -> None:
    """Every placement of the input with whole and sharded weights, including partial sums."""
    mesh = mesh_of_all()
    torch.manual_seed(0)
    x, dy = torch.randn(2, *SHAPE, dtype=torch.float64)
    weight, bias = torch.randn(2, 6, dtype=torch.float64)
    calls = {
        "layer_norm": lambda x, w, b: OF.layer_norm(x, (6,), w, b),
        "rms_norm": lambda x, w, b: OF.rms_norm(x, (6,), w),
        "layer_norm over two": lambda x, w, b: OF.layer_norm(x, (5, 6), w, b),
        "no weights": lambda x, w, b: OF.layer_norm(x, (6,)),
    }
    for name, call in calls.items():
        two = name == "layer_norm over two"
        w, b = (t.expand(5, 6).contiguous() if two else t for t in (weight, bias))
        whole = [t.clone().requires_grad_() for t in (x, w, b)]
        expected = call(*whole)
        expected.backward(dy)
        for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
            for of_weights in (Replicate(), Shard(0)):
                what = f"{name}, {placement}, weights {of_weights}"
                parts = [leaf(x, mesh, [placement]), *(leaf(t, mesh, [of_weights]) for t in (w, b))]
                y = call(*parts)
                kept = placement.is_shard() and placement.dim < (1 if two else 2)
                assert y.placements == ((placement,) if kept else (Replicate(),)), what
                assert (y.shape, y.stride()) == (expected.shape, expected.stride()), what
                assert_close(y.full_tensor(), expected, EXACT, what)
                y.backward(distribute_tensor(dy, mesh, [Shard(1)]))
                for n, came, full in zip(("x", "weight", "bias"), parts, whole, strict=True):
                    if full.grad is not None:
                        assert_gradient(came.grad, full.grad, f"gradient of {n}, {what}")
    pending = DTensor.from_local(x / dist.get_world_size(), mesh, [Partial()])
    expected = OF.layer_norm(x, (6,))
    assert_close(OF.layer_norm(pending, (6,)).full_tensor(), expected, EXACT, "an input that is a pending sum")


def sequence_parallel() -> None:
    """torch's plan for these layers, against torch's own layer under the same plan."""
    mesh = mesh_of_all()
    torch.manual_seed(0)
    world = dist.get_world_size()
    x = torch.randn(2, 2 * world, 6, dtype=torch.float64)
    for theirs, ours in ((torch.nn.LayerNorm, onepass.nn.LayerNorm), (torch.nn.RMSNorm, onepass.nn.RMSNorm)):
        results = []
        for layer in (theirs, ours):
            module = torch.nn.Sequential(layer(6)).double()
            parallelize_module(module, mesh, {"0": SequenceParallel()})
            part = x.chunk(world, 1)[dist.get_rank()].clone().requires_grad_()
            y = module(part)
            assert y.placements == (Shard(1),)
            y.to_local().square().sum().backward()
            results.append([y.full_tensor(), part.grad, *(p.grad.full_tensor() for p in module.parameters())])
        for i, (a, b) in enumerate(zip(*results, strict=True)):
            assert_close(b, a, EXACT, f"result {i} of {ours.__name__} under SequenceParallel")
    dropout = parallelize_module(torch.nn.Sequential(onepass.nn.Dropout(0.5)), mesh, {"0": SequenceParallel()})
    assert dropout(x.chunk(world, 1)[dist.get_rank()]).placements == (Shard(1),)


# ---- dropout ---------------------------------------------------------------------------------------------------------


def dropout_with_a_seed() -> None:
    """The mask is that of the whole tensor, wherever its parts are."""
    mesh = mesh_of_all()
    x = torch.linspace(1, 2, 90, dtype=torch.float64).view(SHAPE).requires_grad_()
    expected = OF.dropout(x, 0.4, seed=7)
    expected.backward(torch.ones_like(x))
    for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
        part = leaf(x, mesh, [placement])
        y = OF.dropout(part, 0.4, seed=7)
        assert y.placements == (placement,)
        assert bits(y.full_tensor()) == bits(expected), placement
        y.backward(torch.ones_like(y))
        assert bits(part.grad.full_tensor()) == bits(x.grad), placement


def dropout_draws() -> None:
    """Parts have different masks although all generators agree; copies share one although the generators differ."""
    mesh = mesh_of_all()
    world = dist.get_world_size()
    ones = torch.ones(world, 4096)
    torch.manual_seed(3)  # on every rank
    part = leaf(ones, mesh, [Shard(0)])
    y = OF.dropout(part, 0.5)
    y.sum().backward()
    assert bits(part.grad.full_tensor()) == bits(y.full_tensor()), "the mask of backward is forward's"
    rows = y.full_tensor() > 0
    for i in range(world):
        assert 1850 < int(rows[i].sum()) < 2250
        for j in range(i):
            assert 1850 < int((rows[i] == rows[j]).sum()) < 2250, f"the masks of ranks {i} and {j} are correlated"
    again = OF.dropout(part, 0.5)
    assert not torch.equal(again.full_tensor(), y.full_tensor())

    torch.manual_seed(dist.get_rank())
    copies = OF.dropout(leaf(ones, mesh, [Replicate()]), 0.5).to_local()
    gathered = [torch.empty_like(copies) for _ in range(world)]
    dist.all_gather(gathered, copies.detach())
    assert len({bits(t) for t in gathered}) == 1, "copies of a replicated tensor have different masks"

    x = distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)])
    assert OF.dropout(x, 0.5, inplace=True) is x
    assert set(x.full_tensor().unique().tolist()) <= {0.0, 2.0}
    assert OF.dropout(x, 0.5, training=False) is x


def dropout_add_norms() -> None:
    mesh = mesh_of_all()
    torch.manual_seed(0)
    values = torch.randn(2, *SHAPE, dtype=torch.float64)
    weight = torch.randn(6, dtype=torch.float64)
    whole = [t.clone().requires_grad_() for t in (*values, weight)]
    y, total = OF.dropout_add_rms_norm(*whole[:2], (6,), whole[2], p=0.3, seed=5)
    (y.sin() + total.cos()).sum().backward()
    for placements in ((Shard(0), Shard(0)), (Shard(1), Replicate()), (Replicate(), Shard(2))):
        parts = [
            *(leaf(t, mesh, [p]) for t, p in zip(values, placements, strict=True)),
            leaf(weight, mesh, [Replicate()]),
        ]
        came = OF.dropout_add_rms_norm(*parts[:2], (6,), parts[2], p=0.3, seed=5)
        (came[0].sin() + came[1].cos()).sum().backward()
        for a, b in zip(came, (y, total), strict=True):
            assert_close(a.full_tensor(), b, EXACT, f"{placements}")
        for a, b in zip(parts, whole, strict=True):
            assert_gradient(a.grad, b.grad, f"gradient, {placements}")


# ---- BatchNorm -------------------------------------------------------------------------------------------------------


def batch_norms() -> None:
    """Statistics of the whole batch, however it is sharded; in evaluation it stays sharded. Channels may be sharded too."""
    mesh = mesh_of_all()
    world = dist.get_world_size()
    torch.manual_seed(0)
    x, dy = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    for sharded_channels in (False, True):
        for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
            what = f"{placement}, channels {'divided' if sharded_channels else 'whole'}"
            torch.manual_seed(1)
            plain = torch.nn.BatchNorm1d(4).double()
            torch.nn.init.normal_(plain.weight)
            module = onepass.nn.BatchNorm1d(4).double()
            module.load_state_dict(plain.state_dict())
            of_channels = [Shard(0)] if sharded_channels else [Replicate()]

            def distribute(_, module, mesh, of_channels=of_channels):
                for name, p in list(module.named_parameters(recurse=False)):
                    setattr(module, name, torch.nn.Parameter(distribute_tensor(p.data, mesh, of_channels)))
                for name, b in list(module.named_buffers(recurse=False)):
                    module.register_buffer(name, distribute_tensor(b, mesh, of_channels if b.dim() else [Replicate()]))

            distribute_module(module, mesh, distribute)
            for training in (True, False):
                plain.train(training)
                module.train(training)
                for m in (plain, module):
                    m.zero_grad()
                whole, part = x.clone().requires_grad_(), leaf(x, mesh, [placement])
                expected, y = plain(whole), module(part)
                expected.backward(dy)
                y.backward(distribute_tensor(dy, mesh, [Replicate()]))
                kept = sharded_channels or (not training and placement in (Shard(0), Shard(2)))
                assert (y.placements == (Replicate(),)) == (not kept), (what, training, y.placements)
                assert_close(y.full_tensor(), expected, EXACT, what)
                assert_gradient(part.grad, whole.grad, f"gradient of x, {what}")
                for (name, p), q in zip(module.named_parameters(), plain.parameters(), strict=True):
                    assert_gradient(p.grad, q.grad, f"gradient of {name}, {what}, training={training}")
                for (name, b), c in zip(module.named_buffers(), plain.named_buffers(), strict=True):
                    assert_close(b.full_tensor(), c[1], EXACT, f"{name}, {what}")
    act = OF.batch_norm_activation(
        *(distribute_tensor(t, mesh, [p]) for t, p in ((x, Shard(0)),)),
        None,
        None,
        training=True,
        residual=distribute_tensor(dy, mesh, [Shard(1)]),
    )
    expected = OF.batch_norm_activation(x, None, None, training=True, residual=dy)
    assert_close(act.full_tensor(), expected, EXACT, f"with a residual and an activation, {world} processes")


# ---- what cannot be --------------------------------------------------------------------------------------------------


def refused() -> None:
    mesh = mesh_of_all()
    x, w = torch.randn(4, 6), torch.ones(6)
    dx, dw = distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(w, mesh, [Replicate()])
    for call, name in (
        (lambda: OF.layer_norm(dx, (6,), w), "weight"),
        (lambda: OF.layer_norm(dx, (6,), dw, w), "bias"),
        (lambda: OF.rms_norm(x, (6,), dw), "input"),
        (lambda: OF.batch_norm(dx, w, w, training=True), "running_mean"),
        (lambda: OF.batch_norm(x, None, None, dw, training=True), "input"),
        (lambda: OF.dropout_add_rms_norm(dx, x, (6,)), "residual"),
    ):
        with pytest.raises(RuntimeError, match=r"got mixed torch\.Tensor and DTensor") as caught:
            call()
        assert name in str(caught.value) or "add" in str(caught.value), caught.value
    with pytest.raises(RuntimeError, match=r"Given normalized_shape=\[5\]"):
        OF.layer_norm(dx, (5,))
    pending = DTensor.from_local(w, mesh, [Partial()])
    with pytest.raises(RuntimeError, match="running_var is placed"):
        OF.batch_norm(dx, dw, pending, training=True)


def compiled() -> None:
    """As one graph."""
    mesh = mesh_of_all()
    torch.manual_seed(0)
    x, w = torch.randn(4, 6), torch.randn(6)
    for call in (
        lambda x, w: OF.layer_norm(x, (6,), w),
        lambda x, w: OF.dropout(x, 0.3, seed=3) * w,
    ):
        results = []
        for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
            parts = leaf(x, mesh, [Shard(0)]), leaf(w, mesh, [Replicate()])
            y = function(*parts)
            y.sin().sum().backward()
            results.append([y.full_tensor(), *(p.grad.full_tensor() for p in parts)])
        for a, b in zip(*results, strict=True):
            assert_close(b, a, 1e-6, "compiled")


def two_dimensions() -> None:
    """A mesh of 2 x 2: rows sharded along both dimensions, replicated along one."""
    mesh = init_device_mesh("cpu", (2, 2))
    torch.manual_seed(0)
    x, w = torch.randn(*SHAPE, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    whole = [t.clone().requires_grad_() for t in (x, w)]
    expected = OF.layer_norm(whole[0], (6,), whole[1])
    expected.sin().sum().backward()
    for placements in ([Shard(0), Shard(1)], [Shard(1), Replicate()], [Replicate(), Shard(2)], [Shard(0), Shard(0)]):
        parts = leaf(x, mesh, placements), leaf(w, mesh, [Replicate(), Shard(0)])
        y = OF.layer_norm(parts[0], (6,), parts[1])
        y.sin().sum().backward()
        assert_close(y.full_tensor(), expected, EXACT, f"{placements}")
        for a, b in zip(parts, whole, strict=True):
            assert_gradient(a.grad, b.grad, f"{placements}")
    torch.manual_seed(dist.get_rank())
    ones = distribute_tensor(torch.ones(2, 4096), mesh, [Replicate(), Shard(0)])
    y = OF.dropout(ones, 0.5).to_local()
    gathered = [torch.empty_like(y) for _ in range(4)]
    dist.all_gather(gathered, y)
    assert bits(gathered[0]) == bits(gathered[2]), "copies along the first dimension"
    assert bits(gathered[1]) == bits(gathered[3]), "copies along the first dimension"
    assert 1850 < int((gathered[0] == gathered[1]).sum()) < 2250


PARTS = [
    norms,
    sequence_parallel,
    dropout_with_a_seed,
    dropout_draws,
    dropout_add_norms,
    batch_norms,
    refused,
    compiled,
]


def work() -> None:
    """All parts in one group of processes, because starting them takes longer than the work."""
    for part in PARTS if dist.get_world_size() == 2 else [two_dimensions]:
        try:
            part()
        except BaseException as error:
            raise AssertionError(f"in {part.__name__}: {error}") from error


def test_two_processes():
    run(2, work)


def test_four_processes():
    run(4, work)
