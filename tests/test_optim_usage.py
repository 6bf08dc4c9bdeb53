"""Training code beyond the simple loop: threads, hooks, casts, many tensors, options switched mid-training."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from rules import RULES, BesideReference, loss_of
from support import HALF, assert_close, assert_same, parameter, snapshot

EVERY_RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def in_double() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()


@EVERY_RULE
def test_optimizers_inside_backward(rule):
    """One optimizer per parameter, stepped by a hook as soon as its gradient is ready."""
    model, twin = in_double(), in_double()
    for m, optimizer_class in ((model, rule.ours), (twin, rule.theirs)):
        for p in m.parameters():
            optimizer = optimizer_class([p], **rule.usual)

            def hook(p, optimizer=optimizer):
                optimizer.step()
                optimizer.zero_grad()

            p.register_post_accumulate_grad_hook(hook)
    for _ in range(4):
        x = torch.randn(5, 6, dtype=torch.float64)
        for m in (model, twin):
            loss_of(m, x).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(p, q, 1e-12, "parameter")


@EVERY_RULE
def test_steps_in_several_threads_at_once(rule):
    """Each Python thread has its own optimizer: nothing is shared, nothing is lost."""

    def train(_):
        generator = torch.Generator().manual_seed(5)
        p = parameter(torch.randn(50_000, generator=generator))
        optimizer = rule.ours([p], max_norm=1.0, **rule.usual)
        for _ in range(10):
            p.grad = torch.randn(50_000, generator=generator)
            optimizer.step()
        return snapshot(optimizer)

    expected = train(0)
    with ThreadPoolExecutor(4) as pool:
        for i, came in enumerate(pool.map(train, range(8))):
            assert_same(came, expected, f"training {i} in a thread")


@EVERY_RULE
def test_thousands_of_tensors(rule, device):
    """More than fit in one launch, of sizes 0 to 6, some without a gradient."""
    params = [parameter(torch.randn(i % 7, device=device)) for i in range(3000)]
    twins = [parameter(p.detach().clone()) for p in params]
    ours, theirs = rule.ours(params, max_norm=0.5, **rule.usual), rule.theirs(twins, **rule.usual)
    for t in range(2):
        for i, (p, twin) in enumerate(zip(params, twins, strict=True)):
            p.grad = None if (i + t) % 5 == 0 else torch.randn_like(p)
            twin.grad = None if p.grad is None else p.grad.clone()
        torch.nn.utils.clip_grad_norm_(twins, 0.5)
        ours.step()
        theirs.step()
    for i, (p, twin) in enumerate(zip(params, twins, strict=True)):
        assert_close(p, twin, 1e-5, f"parameter {i}")


@EVERY_RULE
def test_many_dimensions(rule, device):
    """More than any fixed-size shape holds: dense, and transposed with a gradient of other strides."""
    dense = torch.randn([1] * 14 + [2, 3], device=device)
    transposed = torch.randn([2] * 13, device=device).permute(*reversed(range(13)))
    both = BesideReference(rule, rule.usual, [parameter(dense), parameter(transposed)])
    for _ in range(2):
        both.step([torch.randn_like(dense), torch.randn([2] * 13, device=device)])


@EVERY_RULE
def test_inference_mode(rule):
    """Tensors without version counters, and ordinary ones stepped in inference mode."""
    with torch.inference_mode():
        p = parameter(torch.ones(5))
        both = BesideReference(rule, {**rule.usual, "max_norm": 0.5}, [p])
        for _ in range(2):
            both.step([torch.randn(5)])
    p = parameter(torch.ones(5))
    both = BesideReference(rule, {**rule.usual, "max_norm": 0.5}, [p])
    with torch.inference_mode():
        both.step([torch.randn(5)])
    both.step([torch.randn(5)])
    p.sum().backward()


def test_momentum_switched_on_and_off():
    """As in torch, a buffer is created with momentum, kept while momentum is 0, and used again afterwards."""
    for dampening in (0.0, 0.5):
        p = parameter(torch.randn(5, dtype=torch.float64))
        twin = parameter(p.detach().clone())
        options = {"lr": 0.1, "dampening": dampening}
        pairs = [(p, RULES["SGD"].ours([p], **options)), (twin, RULES["SGD"].theirs([twin], **options))]
        for momentum in (0, 0.9, 0.9, 0, 0.5, 0.5):
            grad = torch.randn(5, dtype=torch.float64)
            for q, optimizer in pairs:
                q.grad = grad.clone()
                optimizer.param_groups[0]["momentum"] = momentum
                optimizer.step()
            assert_close(p, twin, 1e-13, f"parameter with momentum {momentum}, dampening {dampening}")


@pytest.mark.parametrize("half", HALF, ids=str)
@EVERY_RULE
def test_model_cast_in_training(rule, half, device):
    """float32 states also fit 16-bit parameters, so a model may be cast down and up again."""
    p = parameter(torch.randn(20, device=device))
    both = BesideReference(rule, rule.usual, [p])
    for dtype in (torch.float32, half, torch.float32):
        p.grad = None
        p.data = p.data.to(dtype)
        both.expected[0][...] = p.detach().double().cpu().numpy()
        both.step([torch.randn(20, device=device).to(dtype)])


@EVERY_RULE
def test_plain_tensor_as_parameter(rule, device):
    p = torch.ones(4, device=device, requires_grad=True)
    both = BesideReference(rule, rule.usual, [p])
    both.step([torch.randn(4, device=device)])


@EVERY_RULE
def test_subclasses_with_memory_of_their_own(rule, device):
    """A subclass without its own dispatch is treated like any tensor, as a parameter and as its data."""

    class MyParameter(torch.nn.Parameter):
        pass

    class MyTensor(torch.Tensor):
        pass

    for p in (
        MyParameter(torch.ones(4, device=device)),
        torch.nn.Parameter(torch.ones(4, device=device).as_subclass(MyTensor)),
        torch.ones(4, device=device).as_subclass(MyTensor).requires_grad_(),
    ):
        kind = type(p)
        p.grad = torch.full_like(p, 0.5)
        twin = parameter(torch.ones(4, device=device))
        twin.grad = torch.full_like(twin, 0.5)
        rule.ours([p], **rule.usual).step()
        rule.theirs([twin], **rule.usual).step()
        assert type(p) is kind
        assert_close(p.as_subclass(torch.Tensor), twin, 1e-6, f"a {kind.__name__}")


@EVERY_RULE
def test_default_dtype_and_device(rule):
    """The defaults of torch's factory functions do not affect the step, except for torch's own step count."""
    p, twin = (parameter(torch.ones(4)) for _ in range(2))
    p.grad, twin.grad = torch.ones(4), torch.ones(4)
    ours = rule.ours([p], **rule.usual)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            ours.step()
        theirs = rule.theirs([twin], **rule.usual)  # torch's Adagrad creates its state at once
        theirs.step()
    finally:
        torch.set_default_dtype(torch.float32)
    came, expected = ({k: (v.dtype, v.device) for k, v in o.state[q].items()} for o, q in ((ours, p), (theirs, twin)))
    assert came == expected, f"expected {expected}, came {came}"
    ours.step()
    theirs.step()
    assert_close(p, twin, 1e-6, "parameter")
