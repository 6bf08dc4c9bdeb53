"""States kept as bfloat16 or in 8 bits: the codes against NumPy; steps, checkpoints and errors of every rule."""

import copy
import pickle

import numpy as np
import onepass
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onepass.optim import _formats as formats
from reference.formats import GROUP, LEVELS, codes_of, scales_of, values_of
from rules import RULES
from support import assert_same, bits, parameter, snapshot

pytestmark = pytest.mark.skipif(onepass._native._C.cuda_on_host, reason="the CUDA kernels take no other formats")

SIZES = (0, 1, 5, 63, 64, 65, 130, 1000, 4099)
CODES = {"signed8": torch.int8, "unsigned8": torch.uint8}
EIGHT_BITS = pytest.mark.parametrize("format_", CODES)


def encoded(values: torch.Tensor, format_: str) -> tuple[torch.Tensor, torch.Tensor]:
    state = formats.new_state(values, "s", 0.0, format_)
    formats.encode(values.clone(), state["s"], state["s_scale"])
    return state["s"], state["s_scale"]


def values_like_gradients(n: int, format_: str) -> torch.Tensor:
    """Of very different sizes, with exact zeros."""
    x = torch.randn(n) * torch.rand(n) ** 8 * (torch.rand(n) > 0.1)
    return x if format_ == "signed8" else x * x


# ---- the codes


@EIGHT_BITS
@pytest.mark.parametrize("size", SIZES)
def test_codes_and_values_are_the_references(size, format_):
    x = values_like_gradients(size, format_)
    codes, scales = encoded(x, format_)
    x64 = x.double().numpy()
    np.testing.assert_allclose(scales, scales_of(x64, format_), rtol=1e-6)
    # Rounding to nearest, but for the float32 error of the root just beside a tie.
    assert (np.abs(codes.numpy() - codes_of(x64, format_)) <= 0.5 + 1e-4).all()
    expected = values_of(codes.double().numpy(), scales.double().numpy(), format_)
    np.testing.assert_allclose(formats.decode(codes, scales), expected, rtol=1e-5)


@EIGHT_BITS
def test_same_codes_on_every_isa(format_):
    x = torch.cat([values_like_gradients(4099, format_), torch.tensor([1e-45, 3e38, 1e-38])])
    results = {}
    for isa in onepass._native.isas():
        with onepass._native.use_isa(isa):
            codes, scales = encoded(x, format_)
            results[isa] = bits(codes) + bits(scales) + bits(formats.decode(codes, scales))
    assert len(set(results.values())) == 1, f"codes differ between {list(results)}"


@EIGHT_BITS
@given(
    st.lists(
        st.floats(width=32, min_value=-3.4028234663852886e38, max_value=3.4028234663852886e38), min_size=1, max_size=200
    )
)
@settings(max_examples=150, deadline=None)
def test_laws_of_the_codes(format_, numbers):
    """Zero stays zero, signs and order stay, nothing overflows, a positive square stays positive, coding again is stable."""
    x = torch.tensor(numbers, dtype=torch.float32)
    x = x if format_ == "signed8" else x.abs()
    codes, scales = encoded(x, format_)
    decoded = formats.decode(codes, scales)
    assert torch.isfinite(decoded).all()
    assert ((x == 0) <= (codes == 0)).all()
    assert (decoded * x >= 0).all() or format_ == "unsigned8"
    for i in range(0, len(x), GROUP):
        order = x[i : i + GROUP].argsort()
        sorted_codes = codes[i : i + GROUP].int()[order]
        assert (sorted_codes[1:] >= sorted_codes[:-1]).all()
    if format_ == "unsigned8":
        assert ((x > 0) == (codes > 0)).all()
    again, _ = encoded(decoded, format_)
    usable = torch.repeat_interleave(scales, GROUP)[: len(x)] > 1e-8  # smaller values lose digits as denormals
    assert torch.equal(again[usable], codes[usable])


@EIGHT_BITS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_element_makes_its_group_nan(format_, bad):
    x = torch.ones(200)
    x[70] = bad
    if format_ == "unsigned8" and bad < 0:
        pytest.skip("squares are not negative")
    decoded = formats.decode(*encoded(x, format_))
    assert torch.isnan(decoded[64:128]).all()
    assert torch.isfinite(decoded[:64]).all()
    assert torch.isfinite(decoded[128:]).all()


# ---- steps


def format_options(rule) -> list:
    return [torch.bfloat16, *([] if rule.name == "Rprop" else ["8bit"])]


WITH_FORMATS = {key: rule for key, rule in RULES.items() if key != "SparseAdam"}
RULE_AND_OPTION = [
    pytest.param(rule, option, id=f"{key}-{option}")
    for key, rule in WITH_FORMATS.items()
    for option in format_options(rule)
]
SHAPES = ((), (7,), (0,), (65, 3), (4099,))


def grads_for(params, t: int) -> None:
    for i, p in enumerate(params):
        p.grad = None if t > 0 and (i + t) % 4 == 3 else (torch.randn(p.shape) * torch.rand(p.shape) ** 4).to(p.dtype)


def full_copy(optimizer, case, params) -> torch.optim.Optimizer:
    """An optimizer with full states that stands where this one stands."""
    copies = [parameter(p.detach().clone()) for p in params]
    twin = type(optimizer)(copies, **case)
    twin.load_state_dict(copy.deepcopy(onepass.optim.full_state_dict(optimizer)))
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rule", "option"), RULE_AND_OPTION)
def test_a_step_decodes_updates_and_encodes(rule, option, dtype):
    """Every form of the rule: bit for bit what an optimizer with full states does between decoding and encoding."""
    for case in rule.cases:
        case = {**case, "fused_unscale": False}
        params = [parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
        ours = rule.ours(params, **case, state_dtype=option)
        for t in range(4):
            twin = full_copy(ours, case, params) if t > 0 else None
            grads_for(params, t)
            ours.step()
            if twin is None:
                continue
            copies = [p for group in twin.param_groups for p in group["params"]]
            for p, q in zip(params, copies, strict=True):
                q.grad = p.grad
            twin.step()
            again = rule.ours(copies, **case, state_dtype=option)
            again.load_state_dict(twin.state_dict())
            without = {i for i, p in enumerate(params) if p.grad is None}  # coding twice may move a scale by one bit

            def stepped(optimizer, without=without) -> dict[str, bytes]:
                content = snapshot(optimizer)
                return {key: value for key, value in content.items() if int(key.split()[-1]) not in without}

            assert_same(stepped(ours), stepped(again), f"after step {t} with {case}")


@pytest.mark.parametrize(("rule", "option"), RULE_AND_OPTION)
def test_same_bits_for_any_thread_count_and_isa(rule, option):
    """Threads may not divide a group: the sizes put their borders inside of groups."""
    results = {}
    for isa in onepass._native.isas():
        for threads in (1, 2, 3):
            torch.manual_seed(0)
            torch.set_num_threads(threads)
            params = [parameter(torch.randn(n)) for n in (70_001, 13, 400_003)]
            optimizer = rule.ours(params, **rule.usual, state_dtype=option)
            with onepass._native.use_isa(isa):
                for _ in range(2):
                    for p in params:
                        p.grad = torch.randn(p.shape)
                    optimizer.step()
            results[isa, threads] = snapshot(optimizer)
    torch.set_num_threads(2)
    first = next(iter(results.values()))
    for key, came in results.items():
        assert_same(came, first, str(key))


LAYOUTS = {
    "channels_last": lambda: torch.randn(4, 6, 5, 5).contiguous(memory_format=torch.channels_last),
    "slice": lambda: torch.randn(40, 30)[:, ::2],
    "transposed": lambda: torch.randn(40, 30).t(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("option", [torch.bfloat16, "8bit"], ids=str)
def test_layouts(option, layout):
    """Parameters of any strides train like a dense one in the same order of memory."""
    torch.manual_seed(0)
    values = LAYOUTS[layout]()
    order = torch.zeros_like(values)  # dense, with the strides that states get
    p = torch.nn.Parameter(values)
    dense = parameter(order.clone().copy_(values.detach()))
    pair = [onepass.optim.AdamW([q], lr=0.1, max_norm=1.0, state_dtype=option) for q in (p, dense)]
    for _ in range(4):
        grad = torch.randn(values.shape)
        for q, optimizer in zip((p, dense), pair, strict=True):
            q.grad = grad.clone()
            optimizer.step()
        assert torch.equal(p, dense)
    states = [
        formats.full_value("", q, "exp_avg", optimizer.state[q]) for q, optimizer in zip((p, dense), pair, strict=True)
    ]
    assert torch.equal(*states)


def test_a_small_gradient_beside_large_ones_makes_no_huge_step():
    """A second moment that rounds to 0 beside a first moment that does not would divide by eps."""
    torch.manual_seed(0)
    p = parameter(torch.zeros(4096))
    optimizer = onepass.optim.Adam([p], lr=1e-3, state_dtype="8bit")
    for t in range(50):
        p.grad = torch.randn(4096) * torch.logspace(0, -6, 4096) * (torch.rand(4096) > 0.5 if t % 2 else 1)
        optimizer.step()
    assert p.abs().max() < 50 * 5e-3


def test_a_gradient_that_stops_is_forgotten_with_its_group():
    p = parameter(torch.zeros(128))
    optimizer = onepass.optim.Adam([p], lr=0.0, state_dtype="8bit")
    for t in range(3000):
        p.grad = torch.full((128,), 1.0 if t == 0 else 0.0)
        optimizer.step()
    v = formats.full_value("", p, "exp_avg_sq", optimizer.state[p])
    torch.testing.assert_close(v, torch.full((128,), 1e-3 * 0.999**2999), rtol=0.05, atol=0)


def test_memory_of_the_states():
    p = parameter(torch.zeros(64_000))
    p.grad = torch.zeros(64_000)
    bytes_per_element = {}
    for option in (None, torch.bfloat16, "8bit"):
        optimizer = onepass.optim.AdamW([p], state_dtype=option)
        optimizer.step()
        states = [s for name, s in optimizer.state[p].items() if name != "step"]
        bytes_per_element[option] = sum(s.numel() * s.element_size() for s in states) / p.numel()
    assert bytes_per_element == {None: 8.0, torch.bfloat16: 4.0, "8bit": 2.125}


# ---- checkpoints


@pytest.fixture
def trained():
    """(rule, option) -> an optimizer after a few steps."""

    def make(rule, option, steps=4):
        torch.manual_seed(0)
        params = [parameter(torch.randn(shape)) for shape in SHAPES]
        optimizer = rule.ours(params, **rule.usual, state_dtype=option)
        for _ in range(steps):
            grads_for(params, 0)
            optimizer.step()
        return optimizer

    return make


def step_together(first, second, steps=3) -> None:
    for t in range(steps):
        torch.manual_seed(t)
        for optimizer in (first, second):
            generator_state = torch.get_rng_state()
            grads_for([p for group in optimizer.param_groups for p in group["params"]], t)
            torch.set_rng_state(generator_state)
            optimizer.step()


@pytest.mark.parametrize(("rule", "option"), RULE_AND_OPTION)
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_resumes_exactly(rule, option, way, trained):
    first = trained(rule, option)
    if way == "state_dict":
        copies = [parameter(p.detach().clone()) for p in first.param_groups[0]["params"]]
        second = rule.ours(copies, **rule.usual, state_dtype=option)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    elif way == "deepcopy":
        second = copy.deepcopy(first)
    else:
        second = pickle.loads(pickle.dumps(first))
    assert_same(snapshot(first), snapshot(second), "before")
    step_together(first, second)
    assert_same(snapshot(first), snapshot(second), "after three steps")


@pytest.mark.parametrize("to", [None, torch.bfloat16, "8bit"], ids=str)
@pytest.mark.parametrize(("rule", "option"), RULE_AND_OPTION)
def test_one_format_loads_into_another(rule, option, to, trained):
    if to == "8bit" and rule.name == "Rprop":
        pytest.skip("Rprop's states are exact")
    first = trained(rule, option)
    copies = [parameter(p.detach().clone()) for p in first.param_groups[0]["params"]]
    second = rule.ours(copies, **rule.usual, state_dtype=to)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.param_groups[0]["state_dtype"] == to
    names = first._state_names(first.param_groups[0])
    for p, q in zip(first.param_groups[0]["params"], copies, strict=True):
        kinds = onepass._native.find_variant(rule.ours.rule, names)[1].kinds
        for name, kind in zip(names, kinds, strict=True):
            if name not in first.state.get(p, {}):
                continue
            was = formats.full_value("", p, name, first.state[p])
            now = formats.full_value("", q, name, second.state[q])
            # Half a step of the coarser format at the largest root, which the square or the fourth power multiplies.
            power, levels = (2, 127) if kind == "signed" else (4, 255)
            largest = was.abs().max() if was.numel() else 0.0
            allowed = {None: 0.0, torch.bfloat16: 2.0**-8, "8bit": power * 0.6 / levels}[to]
            torch.testing.assert_close(now, was, rtol=0, atol=float(allowed * largest))
    step_together(second, copy.deepcopy(second), 1)


@pytest.mark.parametrize(("rule", "option"), RULE_AND_OPTION)
def test_torch_checkpoints_both_ways(rule, option, trained):
    form = rule.torch_forms([rule.usual])
    if not form:
        pytest.skip("torch has no such form")
    params = [parameter(torch.randn(33, 5))]
    theirs = rule.theirs(params, **form[0])
    params[0].grad = torch.randn(33, 5)
    theirs.step()
    ours = rule.ours([parameter(params[0].detach().clone())], **rule.usual, state_dtype=option)
    ours.load_state_dict(theirs.state_dict())
    step_together(ours, copy.deepcopy(ours), 1)
    back = rule.theirs([parameter(params[0].detach().clone())], **form[0])
    back.load_state_dict(onepass.optim.full_state_dict(ours))
    step_together(back, copy.deepcopy(back), 1)


# ---- what is refused


def test_unknown_formats():
    p = parameter(torch.zeros(3))
    for wrong in ("4bit", torch.float16, 8):
        with pytest.raises(ValueError, match="Invalid state_dtype"):
            onepass.optim.Adam([p], state_dtype=wrong)
    with pytest.raises(ValueError, match="exact values of its state 'prev'"):
        onepass.optim.Rprop([p], state_dtype="8bit")
    with pytest.raises(TypeError):
        onepass.optim.SparseAdam([p], state_dtype="8bit")


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("option", [torch.bfloat16, "8bit"], ids=str)
def test_parameters_of_other_dtypes(option, dtype):
    p = parameter(torch.ones(3, dtype=dtype))
    optimizer = onepass.optim.Adam([p], state_dtype=option)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="state_dtype=None"):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(p, torch.ones_like(p))


def test_sparse_gradients():
    p = parameter(torch.ones(5, 2))
    optimizer = onepass.optim.Adagrad([p], state_dtype="8bit")
    p.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (5, 2), check_invariants=True)
    with pytest.raises(RuntimeError, match="sparse gradient needs its states in the dtype of arithmetic"):
        optimizer.step()


@pytest.mark.parametrize(
    "wrong", [None, torch.ones(1), torch.ones(3), torch.ones(2, 1)], ids=["none", "few", "many", "2-d"]
)
def test_scales_that_do_not_fit(wrong, trained):
    optimizer = trained(RULES["Adam"], "8bit")
    saved = copy.deepcopy(optimizer.state_dict())
    before = snapshot(optimizer)
    saved["state"][3]["exp_avg_scale"] = wrong
    if wrong is None:
        del saved["state"][3]["exp_avg_scale"]
    with pytest.raises(ValueError, match="parameter 3 of group 0: the loaded state 'exp_avg' has 8-bit codes"):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), before, "after a load that failed")
    p = optimizer.param_groups[0]["params"][3]
    if wrong is not None:
        optimizer.state[p]["exp_avg_scale"] = wrong
        with pytest.raises(RuntimeError, match="exp_avg_scale"):
            optimizer.step()


def test_a_changed_option_is_noticed(trained):
    optimizer = trained(RULES["Adam"], None)
    optimizer.param_groups[0]["state_dtype"] = "8bit"
    with pytest.raises(RuntimeError, match="exp_avg"):
        optimizer.step()


def test_levels_are_the_bindings():
    assert onepass._native.SCALE_GROUP == GROUP
    assert formats._LEVELS == LEVELS
