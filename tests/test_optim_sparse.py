"""Sparse gradients update their rows and no others; against float64 references and torch.optim."""

import copy
import math
import re

import onepass
import pytest
import torch
from onepass import _native
from onepass.optim import _staging
from rules import RULES
from sparse import SPARSE, Beside, some_rows, sparse
from support import ARITHMETIC, assert_close, assert_same, bits, parameter, snapshot

EVERY_RULE = pytest.mark.parametrize("rule", SPARSE.values(), ids=SPARSE)


@pytest.fixture(autouse=True)
def one_thread():
    """Most tables here are tiny, but torch's sparse operators start threads for any size."""
    torch.set_num_threads(1)


SHAPES = [(50, 7), (9, 1), (1, 40), (30, 2, 4), (11,)]


@pytest.mark.parametrize(
    "extra",
    [{}, {"maximize": True}, {"max_norm": 0.5}, {"normalize_grads": True}, {"fused_unscale": True, "max_norm": 0.5}],
    ids=str,
)
@EVERY_RULE
def test_rows_beside_the_reference(rule, extra, dtype, device):
    """Duplicates, late and missing gradients, gradients without any row; rows of one element and of several dimensions."""
    params = [parameter(torch.randn(shape, device=device).to(dtype)) for shape in SHAPES]
    both = Beside(rule, {**rule.usual, **extra}, params)
    for t in range(20):
        grads = [some_rows(shape, 1 + shape[0] // 2, dtype, device) for shape in SHAPES]
        grads[1] = None if t < 3 else grads[1]
        grads[2] = sparse(SHAPES[2], [], dtype, device) if t % 3 == 1 else grads[2]
        both.step(grads, 3.0 if "fused_unscale" in extra else None)


CASES = {
    "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.5}],
    "Adagrad": [{}, {"initial_accumulator_value": 0.5, "lr_decay": 0.0}],
    "SparseAdam": [{}, {"betas": (0.5, 0.8), "eps": 0.1}],
}


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("key", "case"), [(key, case) for key in CASES for case in CASES[key]], ids=str)
def test_like_torch(key, case, dtype, maximize, device):
    """Like torch; SGD's momentum moves every row that ever had a gradient."""
    rule, shape = SPARSE[key], (20, 5)
    p = parameter(torch.randn(shape, dtype=dtype, device=device))
    twin = parameter(p.detach().clone())
    ours = rule.ours([p], maximize=maximize, **{**rule.usual, **case})
    theirs = rule.theirs([twin], maximize=maximize, **{**rule.usual, **case})
    for t in range(25):
        p.grad = some_rows(shape, 6, dtype, device)
        twin.grad = p.grad.clone()
        ours.step()
        theirs.step()
        assert_close(p, twin, 2 * ARITHMETIC[dtype], f"parameter after step {t + 1}")
        for name, value in theirs.state[twin].items():
            if value is not None:
                value = value.to_dense() if isinstance(value, torch.Tensor) else torch.tensor(float(value))
                assert_close(ours.state[p][name], value, 2 * ARITHMETIC[dtype], f"{name} after step {t + 1}")


@EVERY_RULE
def test_other_rows_are_not_touched(rule, dtype, device):
    """They are neither read nor written: they and their states stay bit for bit."""
    p = parameter(torch.full((6, 5), math.nan, dtype=dtype, device=device))
    optimizer = rule.ours([p], **rule.usual)
    with torch.no_grad():
        p[[1, 4]] = 1.0
    for _ in range(3):
        p.grad = sparse(p.shape, [4, 1, 4], dtype, device)
        for value in optimizer.state.get(p, {}).values():
            if value.dim():
                value[[0, 2, 3, 5]] = -7.0
        optimizer.step()
    assert p.isnan().all(1).tolist() == [True, False, True, True, False, True]
    assert not bool(p[[1, 4]].isnan().any())
    for name, value in optimizer.state.get(p, {}).items():
        if value.dim():
            assert bool((value[[0, 2, 3, 5]] == -7).all()), f"{name} of other rows"


@EVERY_RULE
def test_as_many_rows_as_threads_share(rule, device):
    """Enough for two threads and many chunks; boundaries fall inside rows."""
    shape = (20_011, 129)
    start = torch.randn(shape, device=device)
    results = {}
    grad = some_rows(shape, 15_000, device=device)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        p = parameter(start.clone())
        optimizer = rule.ours([p], **rule.usual)
        p.grad = grad
        optimizer.step()
        results[threads] = snapshot(optimizer)
    assert_same(results[2], results[1], "two threads against one")
    twin = parameter(start.clone())
    twin.grad = grad.clone()
    rule.theirs([twin], **rule.usual).step()
    assert_close(p, twin, ARITHMETIC[torch.float32], "parameter")


@pytest.mark.parametrize("isa", _native.isas())
@EVERY_RULE
def test_same_bits_as_dense_rows(rule, isa, dtype):
    """A row is computed as it would be in a dense tensor, on every instruction set."""
    for width in (1, 5, 16, 33):
        with _native.use_isa(isa):
            p = parameter(torch.randn(9, width).to(dtype))
            grads = [sparse(p.shape, [7, 2, 3], dtype) for _ in range(3)]
            dense = parameter(p.detach()[[2, 3, 7]].clone())
            case = {**rule.usual, "fused_unscale": False}
            optimizer, other = rule.ours([p], **case), rule.ours([dense], **case)
            for g in grads:
                p.grad = g
                optimizer.step()
                whole = torch.arange(3).unsqueeze(0)
                dense.grad = torch.sparse_coo_tensor(whole, g.coalesce().values(), (3, width))
                if rule.ours is not onepass.optim.SparseAdam:
                    dense.grad = dense.grad.to_dense()
                other.step()
            assert bits(p.detach()[[2, 3, 7]]) == bits(dense), f"rows of {width}"


@EVERY_RULE
def test_every_number_of_sparse_dimensions(rule, device):
    """Elements, rows, and planes of a table of three dimensions."""
    shape = (4, 3, 5)
    mask = torch.rand(shape) < 0.4
    for dims in (1, 2, 3):
        p = parameter(torch.randn(shape, dtype=torch.float64, device=device))
        twin = parameter(p.detach().clone())
        ours, theirs = rule.ours([p], **rule.usual), rule.theirs([twin], **rule.usual)
        for _ in range(3):
            dense = torch.randn(shape, dtype=torch.float64) * mask
            p.grad = dense.to(device).to_sparse(dims)
            twin.grad = p.grad.clone()
            ours.step()
            theirs.step()
        assert_close(p, twin, 1e-13, f"{dims} sparse dimensions")


@EVERY_RULE
def test_tables_that_are_not_contiguous(rule, device, monkeypatch):
    """Updated correctly through a copy, and refused when slow paths are forbidden."""
    base = torch.randn(5, 8, dtype=torch.float64, device=device)
    p, twin = parameter(base.clone().t()), parameter(base.clone().t().contiguous())
    ours, theirs = rule.ours([p], **rule.usual), rule.theirs([twin], **rule.usual)
    for _ in range(3):
        p.grad = some_rows((8, 5), 4, torch.float64, device)
        twin.grad = p.grad.clone()
        ours.step()
        theirs.step()
        assert_close(p, twin, 1e-13, "transposed table")
    before = snapshot(ours)
    monkeypatch.setattr(_staging, "STRICT", True)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*ONEPASS_STRICT"):
        ours.step()
    assert_same(snapshot(ours), before, "after the error")


@pytest.mark.parametrize("key", ["SGD", "Adagrad"])
def test_complex_rows_are_pairs_of_reals(key, device):
    """As dense ones. (torch's sparse Adagrad squares complex numbers instead.)"""
    rule = SPARSE[key]
    p = parameter(torch.randn(6, 3, dtype=torch.complex128, device=device))
    twin = parameter(torch.view_as_real(p.detach()).clone())
    ours, other = rule.ours([p], **rule.usual), rule.ours([twin], **rule.usual)
    for _ in range(3):
        p.grad = sparse(p.shape, [1, 5, 1], torch.complex128, device)
        pairs = p.grad.coalesce()
        twin.grad = torch.sparse_coo_tensor(pairs.indices(), torch.view_as_real(pairs.values()), twin.shape)
        ours.step()
        other.step()
    assert_close(torch.view_as_real(p), twin, 0.0, "complex parameter")


@EVERY_RULE
def test_embedding_in_training(rule, device):
    """A model with sparse and dense gradients in one optimizer, or in two if one does not support both."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Embedding(30, 8, sparse=True), torch.nn.Linear(8, 3)).double().to(device)
    twin = copy.deepcopy(model)

    def made(optimizer, other, m):
        if optimizer.__name__ == "SparseAdam":
            return [optimizer(m[0].parameters(), lr=0.05), other(m[1].parameters(), lr=0.05)]
        return [optimizer(m.parameters(), lr=0.05)]

    pairs = [
        (model, made(rule.ours, onepass.optim.Adam, model)),
        (twin, made(rule.theirs, torch.optim.Adam, twin)),
    ]
    for _ in range(5):
        words, target = torch.randint(30, (16,), device=device), torch.randint(3, (16,), device=device)
        for m, optimizers in pairs:
            for optimizer in optimizers:
                optimizer.zero_grad()
            torch.nn.functional.cross_entropy(m(words), target).backward()
            for optimizer in optimizers:
                optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(p, q, 1e-12, "parameter")


@EVERY_RULE
def test_gradients_are_left_as_they_are(rule):
    p = parameter(torch.ones(5, 2))
    p.grad = grad = sparse(p.shape, [3, 3, 0])
    before = grad._values().clone()
    rule.ours([p], max_norm=0.1, **rule.usual).step()
    assert p.grad is grad
    assert not grad.is_coalesced()
    assert torch.equal(grad._values(), before)


@pytest.mark.parametrize("fused_unscale", [False, True])
@EVERY_RULE
def test_training_with_a_scaler(rule, fused_unscale, device):
    """float16 losses sometimes overflow: step and count are skipped; the scale is divided out once."""
    p = parameter(torch.randn(12, 5, device=device))
    twin = parameter(p.detach().clone())
    case = rule.usual
    sides = [(p, rule.ours([p], fused_unscale=fused_unscale, **case)), (twin, rule.theirs([twin], **case))]
    scalers = [torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=3) for _ in sides]
    for bad in (False, True, False, False, True, False):
        words, factor = torch.randint(12, (7,), device=device), math.inf if bad else 1.0
        for scaler, (q, optimizer) in zip(scalers, sides, strict=True):
            optimizer.zero_grad()
            rows = torch.nn.functional.embedding(words, q, sparse=True)
            scaler.scale((rows * factor).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert_close(p, twin, 1e-5, "table")
    step = sides[0][1].state[p].get("step", torch.tensor(4.0))
    assert step == 4, f"4 steps expected, {step} came"


# ---- refused ---------------------------------------------------------------------------------------------------------


def assert_refused(optimizer, text: str) -> None:
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=re.escape(text)) as caught:
        optimizer.step()
    assert str(caught.value).startswith(text)
    assert "parameter 1 of group 0" in str(caught.value)
    assert_same(snapshot(optimizer), before, "after the error")


def with_a_good_one(cls, p: torch.Tensor, **case) -> torch.optim.Optimizer:
    good = parameter(torch.ones(3, 2))
    good.grad = sparse(good.shape, [1])
    return cls([good, p], **case)


@pytest.mark.parametrize("key", ["SGD", "Adagrad"])
def test_weight_decay(key):
    p, twin = parameter(torch.ones(5, 2)), parameter(torch.ones(5, 2))
    p.grad, twin.grad = sparse(p.shape, [1]), sparse(p.shape, [1])
    with pytest.raises(RuntimeError) as torchs:
        SPARSE[key].theirs([twin], lr=0.1, weight_decay=0.1).step()
    optimizer = SPARSE[key].ours([parameter(torch.ones(3)), p], lr=0.1, weight_decay=0.1)
    assert_refused(optimizer, str(torchs.value))


@pytest.mark.parametrize("key", [key for key in RULES if key not in SPARSE])
def test_the_others_name_what_to_use(key):
    p = parameter(torch.ones(5, 2))
    p.grad = sparse(p.shape, [1])
    with pytest.raises(RuntimeError) as torchs:
        RULES[key].theirs([p]).step()
    optimizer = RULES[key].ours([parameter(torch.ones(3)), p])
    assert_refused(optimizer, str(torchs.value))
    with pytest.raises(RuntimeError, match="SparseAdam, Adagrad and SGD take sparse gradients"):
        optimizer.step()


def test_dense_gradients_of_sparse_adam():
    p = parameter(torch.ones(3, 2))
    optimizer = with_a_good_one(onepass.optim.SparseAdam, p)
    p.grad = torch.ones_like(p)
    assert_refused(optimizer, "SparseAdam does not support dense gradients, please consider Adam instead")


@pytest.mark.parametrize(
    "wrong",
    [
        [torch.ones(2, dtype=torch.complex64)],
        [torch.ones(2).to_sparse()],
        [torch.ones(2), torch.ones(2, dtype=torch.complex64)],
    ],
    ids=["complex", "sparse", "second"],
)
def test_parameters_of_sparse_adam(wrong):
    with pytest.raises(ValueError, match="params at indices") as torchs:
        torch.optim.SparseAdam(wrong)
    with pytest.raises(ValueError, match="params at indices") as ours:
        onepass.optim.SparseAdam(wrong)
    assert str(ours.value) == str(torchs.value)


@pytest.mark.parametrize("case", [{"lr": 0.0}, {"eps": 0.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}], ids=str)
def test_arguments_of_sparse_adam(case):
    p = [parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="Invalid") as torchs:
        torch.optim.SparseAdam(p, **case)
    with pytest.raises(ValueError, match=re.escape(str(torchs.value))):
        onepass.optim.SparseAdam(p, **case)


@pytest.mark.parametrize("bad", [3, -1, 2**40])
@EVERY_RULE
def test_rows_outside_of_the_table(rule, bad):
    """torch writes out of bounds there."""
    p = parameter(torch.ones(3, 2))
    optimizer = with_a_good_one(rule.ours, p)
    p.grad = sparse(p.shape, [0, bad, 1])
    text = f"size is inconsistent with indices: for dim 0, size is 3 but found index {bad}"
    assert_refused(optimizer, text)


def other_shape(p: torch.Tensor) -> None:
    p.data = torch.ones(4, 2)


def other_dtype(p: torch.Tensor) -> None:
    p.data = p.data.double()


def no_table(p: torch.Tensor) -> None:
    p.data = torch.ones(1).expand(3, 2)


@pytest.mark.parametrize("spoil", [other_shape, other_dtype, no_table])
@EVERY_RULE
def test_gradients_that_do_not_fit(rule, spoil):
    p = parameter(torch.ones(3, 2))
    p.grad = sparse(p.shape, [1])
    optimizer = with_a_good_one(rule.ours, p)
    optimizer.step()
    spoil(p)
    assert_refused(optimizer, "parameter 1 of group 0")


def test_momentum_makes_the_gradient_dense(monkeypatch):
    p = parameter(torch.ones(3, 2))
    optimizer = onepass.optim.SGD([parameter(torch.ones(2)), p], lr=0.1, momentum=0.9)
    p.grad = sparse(p.shape, [1])
    monkeypatch.setattr(_staging, "STRICT", True)
    assert_refused(optimizer, "parameter 1 of group 0")


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["SparseAdam", "SGD", "Adagrad"])
def test_states_go_both_ways(key, device):
    """SGD's buffer is sparse in torch and dense here; SparseAdam counts steps in an int."""
    rule = SPARSE[key]
    case = {**rule.usual, "momentum": 0.9} if key == "SGD" else rule.usual
    p = parameter(torch.randn(9, 4, dtype=torch.float64, device=device))
    twin = parameter(p.detach().clone())
    ours, theirs = rule.ours([p], **case), rule.theirs([twin], **case)

    def train():
        for _ in range(4):
            p.grad = some_rows(p.shape, 3, torch.float64, device)
            twin.grad = p.grad.clone()
            ours.step()
            theirs.step()
            assert_close(p, twin, 1e-12, "parameter")

    train()
    ours, theirs, saved = rule.ours([p], **case), rule.theirs([twin], **case), (ours.state_dict(), theirs.state_dict())
    ours.load_state_dict(copy.deepcopy(saved[1]))
    theirs.load_state_dict(copy.deepcopy(saved[0]))
    train()
    assert {k: type(v) for k, v in ours.state_dict()["state"][0].items()} == {
        k: type(v) for k, v in theirs.state_dict()["state"][0].items()
    }


def test_copies_of_sparse_adam():
    p = parameter(torch.ones(3, 2))
    optimizer = onepass.optim.SparseAdam([p])
    p.grad = sparse(p.shape, [1])
    optimizer.step()
    other = copy.deepcopy(optimizer)
    assert_same(snapshot(other), snapshot(optimizer), "the copy")
    assert repr(other) == repr(optimizer)
