"""States in bfloat16 and 8 bits, masters and stochastic rounding: the codes against NumPy; steps, checkpoints and errors."""

import copy
import pickle

import numpy as np
import onepass
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onepass.optim import _codes, _formats
from reference.formats import (
    EXPONENTS,
    GROUP,
    SIGN,
    bfloat16_of,
    code_values,
    positions_of,
    random_bits,
    scales_of,
    values_of,
)
from rules import RULES
from support import assert_same, bits, parameter, snapshot

SIZES = (1, 5, 63, 64, 65, 130, 1000, 4099)
EIGHT_BITS = pytest.mark.parametrize("format_", EXPONENTS)


def encoded(values: torch.Tensor, format_: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounded to nearest, as when a checkpoint is loaded."""
    codes = torch.zeros(values.shape, dtype=torch.uint8)
    scale = torch.zeros(-(-values.numel() // GROUP))
    _codes.encode(format_, values, codes, scale)
    return codes, scale


def stored_by_kernel(gradient: torch.Tensor, format_: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a first step stores: of SGD, whose velocity is the gradient then; of Adagrad, whose sum is its square."""
    p = parameter(torch.zeros_like(gradient))
    p.grad = gradient.clone()
    if format_ == "signed8":
        optimizer, state = onepass.optim.SGD([p], momentum=0.9, state_dtype="8bit"), "momentum_buffer"
    else:
        optimizer, state = onepass.optim.Adagrad([p], state_dtype="8bit"), "sum"
    optimizer.step()
    return optimizer.state[p][f"{state}_codes"], optimizer.state[p][f"{state}_scale"]


def stored_values(gradient: torch.Tensor, format_: str) -> torch.Tensor:
    return gradient if format_ == "signed8" else gradient * gradient


def gradients(n: int) -> torch.Tensor:
    """Of very different sizes, with exact zeros."""
    torch.manual_seed(n)
    return torch.randn(n) * torch.rand(n) ** 8 * (torch.rand(n) > 0.1) + 0.0  # no -0, which would become 0 in a sum


# ---- the codes


def check_codes(codes: np.ndarray, x: np.ndarray, format_: str, u: np.ndarray) -> None:
    """Codes are floor(position + u), but for the float32 error of the position just beside a whole number."""
    position = positions_of(x, format_) + u
    magnitude = (codes & (SIGN - 1) if format_ == "signed8" else codes).astype(np.int64)
    expected = np.floor(position).astype(np.int64)
    if format_ == "unsigned8":
        expected = np.maximum(expected, x > 0)
    beside = np.abs(position - np.round(position)) < 1e-3
    assert ((magnitude == expected) | beside & (np.abs(magnitude - expected) <= 1)).all()
    assert beside.mean() < 0.05 or len(x) < 100
    if format_ == "signed8":
        assert ((codes & SIGN != 0) == np.signbit(x)).all()


@EIGHT_BITS
@pytest.mark.parametrize("size", SIZES)
def test_kernels_store_the_references_codes(size, format_):
    gradient = gradients(size)
    x = stored_values(gradient, format_).double().numpy()
    codes, scale = stored_by_kernel(gradient, format_)
    np.testing.assert_array_equal(scale.double(), scales_of(x))
    u = random_bits(size, 1, 0).astype(np.float64) / 2**32
    check_codes(codes.numpy(), x, format_, np.floor(u * 2**20) / 2**20)


@EIGHT_BITS
@pytest.mark.parametrize("size", SIZES)
def test_loading_stores_the_nearest_codes(size, format_):
    x = stored_values(gradients(size), format_)
    codes, scale = encoded(x, format_)
    np.testing.assert_array_equal(scale.double(), scales_of(x.double().numpy()))
    check_codes(codes.numpy(), x.double().numpy(), format_, np.full(size, 0.5))
    expected = values_of(codes.numpy(), scale.double().numpy(), format_)
    np.testing.assert_allclose(_codes.decode(format_, codes, scale), expected, rtol=1e-6, atol=1e-45)


@EIGHT_BITS
def test_every_code_decodes_to_its_value(format_):
    codes = torch.arange(256, dtype=torch.uint8)
    scale = torch.tensor([1.0, 0.25, 1024.0, 2.0**-100])
    expected = values_of(codes.numpy(), scale.double().numpy(), format_)
    np.testing.assert_allclose(_codes.decode(format_, codes, scale), expected, rtol=1e-6)
    assert code_values(format_)[0] == 0
    # The kernels read the same values: with a gradient of 0 a step of size 1 subtracts the velocity.
    if format_ == "signed8":
        p = parameter(torch.zeros(256))
        p.grad = torch.zeros(256)
        optimizer = onepass.optim.SGD([p], lr=1.0, momentum=1.0, state_dtype="8bit")
        optimizer.step()
        optimizer.state[p]["momentum_buffer_codes"].copy_(codes)
        optimizer.state[p]["momentum_buffer_scale"].copy_(scale)
        optimizer.step()
        np.testing.assert_allclose(-p.detach(), expected, rtol=1e-6)


@EIGHT_BITS
@given(st.lists(st.floats(width=32, min_value=-(2.0**126), max_value=2.0**126), min_size=1, max_size=200))
@settings(max_examples=150, deadline=None)
def test_laws_of_the_codes(format_, numbers):
    """Zero stays zero, signs and order stay, nothing overflows, a positive square stays positive."""
    x = torch.tensor(numbers, dtype=torch.float32)
    x = x if format_ == "signed8" else x.abs()
    codes, scale = encoded(x, format_)
    decoded = _codes.decode(format_, codes, scale)
    assert torch.isfinite(decoded).all()
    assert ((x == 0) <= (decoded == 0)).all()
    assert (torch.sign(decoded) * torch.sign(x) >= 0).all()
    for i in range(0, len(x), GROUP):
        order = x[i : i + GROUP].argsort()
        in_order = decoded[i : i + GROUP][order]
        assert (in_order[1:] >= in_order[:-1]).all()
    if format_ == "unsigned8":
        assert ((x > 0) == (codes > 0)).all()


@EIGHT_BITS
@pytest.mark.parametrize("store", [stored_by_kernel, encoded], ids=["kernel", "loading"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3e38])
def test_a_group_with_an_overflow_has_no_finite_number(format_, bad, store):
    x = torch.ones(200)
    x[70] = bad
    codes, scale = store(x, format_) if store is stored_by_kernel else encoded(stored_values(x, format_), format_)
    decoded = _codes.decode(format_, codes, scale)
    is_nan = format_ == "signed8" or bad != bad
    assert (torch.isnan if is_nan else torch.isinf)(decoded[64:128]).all()
    assert torch.isfinite(decoded[:64]).all()
    assert torch.isfinite(decoded[128:]).all()


# ---- rounding


def test_rounding_keeps_the_mean():
    """Over the elements of one step and over the steps of one element, for each state and the parameter."""
    for stream in range(5):
        by_element = random_bits(100_000, 7, stream) / 2**32
        by_step = np.array([random_bits(10, t, stream)[9] for t in range(1, 4001)]) / 2**32
        for u in (by_element, by_step):
            np.testing.assert_allclose(np.histogram(u, 8, (0, 1))[0] / len(u), 1 / 8, atol=0.02)
        assert abs(np.corrcoef(by_step[1:], by_step[:-1])[0, 1]) < 0.05


@pytest.mark.parametrize("option", [torch.bfloat16, "8bit"], ids=str)
def test_a_slow_average_follows_its_gradient(option):
    """A second moment with beta2 = 0.999 rises to the square of a constant gradient and falls when that stops."""
    p = parameter(torch.zeros(4096))
    optimizer = onepass.optim.Adam([p], lr=0.0, state_dtype=option)
    scales = torch.logspace(0, -2, 4096)
    for steps, size in ((3000, 1.0), (3000, 0.1)):
        for _ in range(steps):
            p.grad = scales * size
            optimizer.step()
        v = full(optimizer, p, "exp_avg_sq")
        expected = (1 - 0.999**3000) if size == 1.0 else (1 - 0.999**3000) * 0.999**3000 + 0.01 * (1 - 0.999**3000)
        assert abs((v / scales**2).mean().item() / expected - 1) < 0.05
        assert (v / scales**2 / expected).std() < (0.1 if option is torch.bfloat16 else 0.5)


def full(optimizer, p, state):
    """A state as float32."""
    rule = type(optimizer).rule
    return _formats.full_value("", p, _formats.code_format(rule, state), state, optimizer.state[p])


def test_stochastic_rounding_of_parameters():
    """Updates far below the spacing of bfloat16 add up; without the option they are lost."""
    moved = {}
    for stochastic in (False, True):
        p = parameter(torch.ones(10_000, dtype=torch.bfloat16))
        optimizer = onepass.optim.SGD([p], lr=1.0, stochastic_rounding=stochastic)
        for _ in range(200):
            p.grad = torch.full_like(p, 2.0**-12)
            optimizer.step()
        moved[stochastic] = 1 - p.float().mean().item()
    assert moved[False] == 0
    assert abs(moved[True] / (200 * 2.0**-12) - 1) < 0.05


def test_rounded_parameters_are_the_references():
    torch.manual_seed(0)
    p = parameter(torch.randn(4099, dtype=torch.bfloat16))
    p.grad = torch.randn_like(p)
    before = p.detach().float()
    optimizer = onepass.optim.SGD([p], lr=0.01, stochastic_rounding=True)
    optimizer.step()
    exact = before - torch.tensor(0.01) * p.grad.float()
    expected = bfloat16_of(exact.numpy(), random_bits(4099, 1, 4)).astype(np.int16)
    np.testing.assert_array_equal(p.detach().view(torch.int16), expected)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf"), 3.3e38, 1e-40, -0.0])
@pytest.mark.parametrize("options", [{"stochastic_rounding": True}, {"master_bits": 32}, {"master_bits": 24}], ids=str)
def test_special_parameters(options, special):
    p = parameter(torch.full((70,), special, dtype=torch.bfloat16))
    p.grad = torch.zeros_like(p)
    before = p.detach().clone()
    optimizer = onepass.optim.SGD([p], lr=0.1, **options)
    optimizer.step()
    torch.testing.assert_close(p.detach(), before, rtol=0, atol=0, equal_nan=True)
    bad = parameter(torch.ones(3, dtype=torch.bfloat16))
    bad.grad = torch.tensor([0x7FFF, -1, 0x7F80], dtype=torch.int16).view(
        torch.bfloat16
    )  # NaNs with all bits set, infinity
    onepass.optim.SGD([bad], lr=0.1, **options).step()
    assert bad[:2].isnan().all()
    assert bad[2] == float("-inf")


# ---- steps


def digits_needed(rule, case) -> str:
    """The kind of the state that needs most digits, under these options."""
    optimizer = rule.ours([parameter(torch.zeros(1))], **{**case, "fused_unscale": False})
    kinds = onepass._native.find_variant(rule.ours.rule, optimizer._state_names(optimizer.param_groups[0]))[1].kinds
    return "float32" if "float32" in kinds else "exact" if "exact" in kinds else ""


def usual_case(rule) -> dict:
    return {**rule.usual, "centered": False} if "centered" in rule.usual else rule.usual


def takes(rule, case, option) -> bool:
    """Whether the states may be kept so."""
    refused = {"8bit": ("float32", "exact"), torch.bfloat16: ("float32",), None: ()}[option]
    return digits_needed(rule, case) not in refused


WITH_FORMATS = {key: rule for key, rule in RULES.items() if key != "SparseAdam"}
RULE_AND_OPTION = [
    pytest.param(rule, option, id=f"{key}-{option}")
    for key, rule in WITH_FORMATS.items()
    for option in (torch.bfloat16, "8bit")
    if takes(rule, usual_case(rule), option)
]
SHAPES = ((), (7,), (0,), (65, 3), (4099,))


def usable_cases(rule, option) -> list:
    return [case for case in rule.cases if takes(rule, case, option)]


def grads_for(params, t: int) -> None:
    for i, p in enumerate(params):
        p.grad = None if t > 0 and (i + t) % 4 == 3 else (torch.randn(p.shape) * torch.rand(p.shape) ** 4).to(p.dtype)


def full_copy(optimizer, case) -> torch.optim.Optimizer:
    """An optimizer with full states that stands where this one stands."""
    params = optimizer.param_groups[0]["params"]
    twin = type(optimizer)([parameter(p.detach().clone()) for p in params], **case)
    twin.load_state_dict(copy.deepcopy(onepass.optim.full_state_dict(optimizer)))
    for p, q in zip(params, twin.param_groups[0]["params"], strict=True):
        q.grad = p.grad
    return twin


def spacing(x: torch.Tensor, optimizer, p, state: str) -> torch.Tensor:
    """At least the distance of neighbouring numbers of a state's format."""
    scale = optimizer.state[p].get(f"{state}_scale")
    if scale is None:
        return x.abs() * 2.0**-7 + 2.0**-133
    b = 2.0 ** -(EXPONENTS[_formats.code_format(type(optimizer).rule, state)] - 1)
    flat = scale.repeat_interleave(GROUP)[: x.numel()]
    return (x.abs() + b * flat.view(x.shape)) / 7.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rule", "option"), RULE_AND_OPTION)
def test_a_step_decodes_updates_and_encodes(rule, option, dtype):
    """Every form of the rule: the parameters have the bits of a step with full states, the states are beside its."""
    for case in usable_cases(rule, option):
        case = {**case, "fused_unscale": False}
        torch.manual_seed(0)
        params = [parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
        ours = rule.ours(params, **case, state_dtype=option)
        for t in range(4):
            grads_for(params, t)
            twin = full_copy(ours, case) if t > 0 else None
            ours.step()
            if twin is None:
                continue
            twin.step()
            for i, (p, q) in enumerate(zip(params, twin.param_groups[0]["params"], strict=True)):
                what = f"parameter {i} after step {t} with {case}"
                assert bits(p) == bits(q), what
                for state in ours._state_names(ours.param_groups[0]):
                    if p.grad is None or p.numel() == 0:
                        continue
                    came, exact = full(ours, p, state), twin.state[q][state]
                    assert ((came - exact).abs() <= spacing(exact, ours, p, state)).all(), f"{state} of {what}"
                    assert ((exact != 0) | (came == 0)).all(), f"zeros of {state} of {what}"


@pytest.mark.parametrize("options", [{"master_bits": 32}, {"master_bits": 32, "state_dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("rule", WITH_FORMATS.values(), ids=WITH_FORMATS)
def test_a_master_of_32_bits_is_a_float32_parameter(rule, options):
    """Bit for bit, for every form of the rule; the parameter is that number rounded to bfloat16."""
    for case in usable_cases(rule, options.get("state_dtype")):
        case = {**case, "fused_unscale": False}
        torch.manual_seed(0)
        params = [parameter(torch.randn(shape).to(torch.bfloat16)) for shape in SHAPES]
        masters = [parameter(p.detach().float()) for p in params]
        ours = rule.ours(params, **case, **options)
        theirs = rule.ours(masters, **case, state_dtype=options.get("state_dtype"))
        for t in range(5):
            grads_for(params, t)
            for p, m in zip(params, masters, strict=True):
                m.grad = None if p.grad is None else p.grad.float()
            ours.step()
            theirs.step()
            for p, m in zip(params, masters, strict=True):
                remainder = ours.state.get(p, {}).get("param_remainder")
                if remainder is not None:
                    master = (p.detach().view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)
                    assert bits(master) == bits(m), f"step {t} with {case}"
                    assert ((p - m).abs() <= m.abs() * 2.0**-8).all()
        assert ours.state[params[4]]["param_remainder"].dtype == torch.int16


def test_a_master_of_24_bits_keeps_small_updates():
    torch.manual_seed(0)
    moved = {}
    for options in ({}, {"master_bits": 24}, {"master_bits": 24, "state_dtype": "8bit"}):
        p = parameter(torch.rand(10_000).to(torch.bfloat16) + 1)
        start = p.detach().double()
        optimizer = onepass.optim.SGD([p], lr=1.0, momentum=0.5, **options)
        for _ in range(300):
            p.grad = torch.full_like(p, 1e-5)
            optimizer.step()
        remainder = optimizer.state[p].get("param_remainder", torch.zeros(())).double()
        unit = 2.0**-15  # of the remainder: 1/256 of bfloat16's spacing between 1 and 2
        moved[str(options)] = ((start - p.detach().double() - remainder * unit / 1).mean() / (300 * 2e-5)).item()
    assert moved.pop("{}") == 0
    for options, ratio in moved.items():
        assert abs(ratio - 1) < 0.05, options


def test_a_parameter_written_from_outside_is_its_own_master():
    p = parameter(torch.ones(100, dtype=torch.bfloat16))
    optimizer = onepass.optim.SGD([p], lr=1.0, master_bits=32)
    p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    assert optimizer.state[p]["param_remainder"].any()
    with torch.no_grad():
        p.fill_(2.0)
    optimizer.sync_master()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert (p == 2).all()
    assert not optimizer.state[p]["param_remainder"].any()


OPTIONS = {
    "bfloat16": {"state_dtype": torch.bfloat16},
    "8bit": {"state_dtype": "8bit"},
    "8bit-32": {"state_dtype": "8bit", "master_bits": 32},
    "8bit-24": {"state_dtype": "8bit", "master_bits": 24},
    "stochastic": {"state_dtype": torch.bfloat16, "stochastic_rounding": True},
    "32": {"master_bits": 32},
}


def combinations() -> list:
    return [
        pytest.param(rule, options, id=f"{key}-{name}")
        for key, rule in WITH_FORMATS.items()
        for name, options in OPTIONS.items()
        if takes(rule, usual_case(rule), options.get("state_dtype"))
    ]


def dtype_for(options) -> torch.dtype:
    return torch.float32 if set(options) == {"state_dtype"} else torch.bfloat16


@pytest.mark.parametrize(("rule", "options"), combinations())
def test_same_bits_for_any_thread_count_and_isa(rule, options):
    """Threads may not divide a group: the sizes put their borders inside of groups."""
    results = {}
    for isa in onepass._native.isas():
        for threads in (1, 2, 3):
            torch.manual_seed(0)
            torch.set_num_threads(threads)
            params = [parameter(torch.randn(n).to(dtype_for(options))) for n in (70_001, 13, 400_003)]
            optimizer = rule.ours(params, **usual_case(rule), **options)
            with onepass._native.use_isa(isa):
                for _ in range(2):
                    for p in params:
                        p.grad = torch.randn(p.shape).to(p.dtype)
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
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layouts(options, layout):
    """Parameters of any strides train like a dense one in the same order of memory."""
    torch.manual_seed(0)
    values = LAYOUTS[layout]().to(dtype_for(options))
    if layout == "slice":
        values = torch.zeros(40, 30, dtype=values.dtype)[:, ::2].copy_(values)
    p = torch.nn.Parameter(values)
    dense = parameter(torch.zeros_like(values).copy_(values.detach()))
    pair = [onepass.optim.AdamW([q], lr=0.1, max_norm=1.0, **options) for q in (p, dense)]
    for _ in range(4):
        grad = torch.randn(values.shape).to(values.dtype)
        for q, optimizer in zip((p, dense), pair, strict=True):
            q.grad = grad.clone()
            optimizer.step()
        assert torch.equal(p, dense)
    states = [full(optimizer, q, "exp_avg") for q, optimizer in zip((p, dense), pair, strict=True)]
    assert torch.equal(*states)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_change_of_layout_moves_the_states_along(options):
    torch.manual_seed(0)
    p = parameter(torch.randn(4, 6, 5, 5).to(dtype_for(options)))
    optimizer = onepass.optim.AdamW([p], lr=0.1, **options)
    p.grad = torch.randn_like(p)
    optimizer.step()
    before = full(optimizer, p, "exp_avg").clone()
    p.data = p.data.contiguous(memory_format=torch.channels_last)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    after = full(optimizer, p, "exp_avg")
    assert after.stride() == p.stride()
    # Once rounded to nearest in other groups, once at random after the decay by 0.9.
    assert ((after - 0.9 * before).abs() <= before.abs() / 4 + before.abs().max() * 2.0**-17).all()


def test_a_small_gradient_beside_large_ones_makes_no_huge_step():
    """A second moment that rounds to 0 beside a first moment that does not would divide by eps."""
    torch.manual_seed(0)
    p = parameter(torch.zeros(4096))
    optimizer = onepass.optim.Adam([p], lr=1e-3, state_dtype="8bit")
    for t in range(50):
        p.grad = torch.randn(4096) * torch.logspace(0, -12, 4096) * (torch.rand(4096) > 0.5 if t % 2 else 1)
        optimizer.step()
    assert p.abs().max() < 50 * 5e-3


def test_an_overflow_of_a_square_stops_its_group_as_it_stops_its_element():
    p = parameter(torch.ones(128))
    optimizer = onepass.optim.Adam([p], lr=0.1, betas=(0.0, 0.9), state_dtype="8bit")
    p.grad = torch.ones(128)
    p.grad[3] = 1e25
    optimizer.step()
    stopped = p.detach().clone()
    p.grad = torch.ones(128)
    optimizer.step()
    assert (p[:64] == stopped[:64]).all()
    assert (p[64:] < stopped[64:]).all()


def test_memory_of_the_states():
    bytes_per_element = {}
    for name, options in {"none": {}, **OPTIONS}.items():
        p = parameter(torch.zeros(64_000, dtype=dtype_for(options)))
        p.grad = torch.zeros_like(p)
        optimizer = onepass.optim.AdamW([p], **options)
        optimizer.step()
        states = [s for key, s in optimizer.state[p].items() if key != "step"]
        bytes_per_element[name] = sum(s.numel() * s.element_size() for s in states) / p.numel()
    assert bytes_per_element == {
        "none": 8.0,
        "bfloat16": 4.0,
        "8bit": 2.125,
        "8bit-32": 4.125,
        "8bit-24": 3.125,
        "stochastic": 4.0,
        "32": 10.0,
    }


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("wrap", [onepass.optim.Lookahead, None], ids=["Lookahead", "SAM"])
def test_wrappers(wrap, options):
    torch.manual_seed(0)
    p = parameter(torch.randn(200).to(dtype_for(options)))
    if wrap is None:
        optimizer = onepass.optim.SAM([p], onepass.optim.AdamW, lr=0.05, **options)
    else:
        optimizer = wrap(onepass.optim.AdamW([p], lr=0.05, **options), k=2)

    def closure():
        optimizer.zero_grad()
        loss = (p.float() ** 2).sum()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(60):
        optimizer.step(closure)
    assert closure().item() < 0.3 * first
    with pytest.raises(TypeError, match="base_optimizer"):
        onepass.optim.full_state_dict(optimizer)


def test_a_parameter_listed_twice():
    p = parameter(torch.ones(100))
    p.grad = torch.randn(100)
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = onepass.optim.AdamW([p, p], state_dtype="8bit")
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


# ---- checkpoints


@pytest.fixture
def trained():
    """(rule, options) -> an optimizer after a few steps."""

    def make(rule, options, steps=4):
        torch.manual_seed(0)
        params = [parameter(torch.randn(shape).to(dtype_for(options))) for shape in SHAPES]
        optimizer = rule.ours(params, **usual_case(rule), **options)
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


@pytest.mark.parametrize(("rule", "options"), combinations())
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_resumes_exactly(rule, options, way, trained):
    first = trained(rule, options)
    if way == "state_dict":
        copies = [parameter(p.detach().clone()) for p in first.param_groups[0]["params"]]
        second = rule.ours(copies, **usual_case(rule), **options)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    elif way == "deepcopy":
        second = copy.deepcopy(first)
    else:
        second = pickle.loads(pickle.dumps(first))
    assert_same(snapshot(first), snapshot(second), "before")
    step_together(first, second)
    assert_same(snapshot(first), snapshot(second), "after three steps")


@pytest.mark.parametrize("to", [{}, *OPTIONS.values()], ids=["none", *OPTIONS])
@pytest.mark.parametrize(("rule", "options"), combinations())
def test_one_format_loads_into_another(rule, options, to, trained):
    if not takes(rule, usual_case(rule), to.get("state_dtype")):
        pytest.skip("the rule refuses it")
    first = trained(rule, options)
    copies = [parameter(p.detach().to(dtype_for(to))) for p in first.param_groups[0]["params"]]
    second = rule.ours(copies, **usual_case(rule), **to)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.param_groups[0]["state_dtype"] == to.get("state_dtype")
    assert second.param_groups[0]["master_bits"] == to.get("master_bits")
    for p, q in zip(first.param_groups[0]["params"], copies, strict=True):
        for state in first._state_names(first.param_groups[0]):
            if p not in first.state or p.numel() == 0:
                continue
            was, now = full(first, p, state), full(second, q, state)
            allowed = spacing(was, second, q, state) if to.get("state_dtype") is not None else 0 * was
            assert ((now - was).abs() <= allowed).all()
    step_together(second, copy.deepcopy(second), 1)


@pytest.mark.parametrize(("rule", "option"), RULE_AND_OPTION)
def test_torch_checkpoints_both_ways(rule, option, trained):
    form = rule.torch_forms([usual_case(rule)])
    if not form:
        pytest.skip("torch has no such form")
    params = [parameter(torch.randn(33, 5))]
    theirs = rule.theirs(params, **form[0])
    params[0].grad = torch.randn(33, 5)
    theirs.step()
    ours = rule.ours([parameter(params[0].detach().clone())], **usual_case(rule), state_dtype=option)
    ours.load_state_dict(theirs.state_dict())
    step_together(ours, copy.deepcopy(ours), 1)
    back = rule.theirs([parameter(params[0].detach().clone())], **form[0])
    back.load_state_dict(onepass.optim.full_state_dict(ours))
    step_together(back, copy.deepcopy(back), 1)
    keys = back.state[back.param_groups[0]["params"][0]].keys()
    assert keys == theirs.state[params[0]].keys()


def test_torch_does_not_take_codes_for_numbers(trained):
    saved = trained(RULES["Adam"], OPTIONS["8bit"]).state_dict()
    params = [parameter(torch.zeros(shape)) for shape in SHAPES]
    theirs = torch.optim.Adam(params)
    theirs.load_state_dict(copy.deepcopy(saved))
    grads_for(params, 0)
    with pytest.raises(KeyError, match="exp_avg"):
        theirs.step()


def test_a_slow_average_resumes_without_a_step_count():
    """torch's SGD keeps none; our compressed one needs one, and starts it at 0."""
    p, q = (parameter(torch.ones(50)) for _ in range(2))
    theirs = torch.optim.SGD([p], lr=0.1, momentum=0.9, dampening=0.5)
    p.grad = torch.randn(50)
    theirs.step()
    ours = onepass.optim.SGD([q], lr=0.1, momentum=0.9, dampening=0.5, state_dtype=torch.bfloat16)
    ours.load_state_dict(theirs.state_dict())
    q.grad = torch.zeros(50)
    ours.step()  # a fresh buffer would become the gradient, 0
    torch.testing.assert_close(full(ours, q, "momentum_buffer"), 0.9 * p.grad, rtol=0.02, atol=0)
    assert set(onepass.optim.full_state_dict(ours)["state"][0]) == {"momentum_buffer"}


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"state_dtype": "4bit"}, "Invalid state_dtype: '4bit'"),
        ({"state_dtype": torch.float16}, "Invalid state_dtype: torch.float16"),
        ({"state_dtype": 8}, "Invalid state_dtype: 8"),
        ({"state_dtype": ["8bit"]}, "Invalid state_dtype"),
        ({"master_bits": 16}, "Invalid master_bits: 16"),
        ({"master_bits": True}, "Invalid master_bits: True"),
        ({"master_bits": 32.0}, "Invalid master_bits: 32.0"),
        ({"stochastic_rounding": 1}, "Invalid stochastic_rounding: 1"),
        ({"master_bits": 32, "stochastic_rounding": True}, "exclude each other"),
    ],
    ids=str,
)
def test_unknown_formats(options, text):
    p = parameter(torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=text):
        onepass.optim.Adam([p], **options)
    optimizer = onepass.optim.Adam([p])
    with pytest.raises(ValueError, match=text):
        optimizer.add_param_group({"params": [parameter(torch.zeros(2))], **options})


def test_states_that_need_more_digits():
    p = parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="'8bit'; Rprop needs more digits of its state 'prev'"):
        onepass.optim.Rprop([p], state_dtype="8bit")
    for option in ("8bit", torch.bfloat16):
        with pytest.raises(ValueError, match="RMSprop needs more digits of its state 'square_avg'"):
            onepass.optim.RMSprop([p], centered=True, state_dtype=option)
    with pytest.raises(TypeError):
        onepass.optim.SparseAdam([p], state_dtype="8bit")


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_parameters_of_other_dtypes(options, dtype):
    if dtype in (torch.float32, torch.float16) and set(options) == {"state_dtype"}:
        pytest.skip("which are supported")
    p = parameter(torch.ones(3, dtype=dtype))
    optimizer = onepass.optim.Adam([p], **options)
    p.grad = torch.ones_like(p)
    option = next(name for name in ("master_bits", "stochastic_rounding", "state_dtype") if name in options)
    with pytest.raises(ValueError, match=f"parameter 0 of group 0 has dtype {dtype}; {option} is for"):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(p, torch.ones_like(p))


def test_sparse_gradients():
    p = parameter(torch.ones(5, 2))
    optimizer = onepass.optim.Adagrad([p], state_dtype="8bit")
    p.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (5, 2), check_invariants=True)
    with pytest.raises(RuntimeError, match="sparse gradient needs parameters and states in the dtype of arithmetic"):
        optimizer.step()


WRONG_SCALES = {
    "none": None,
    "few": torch.ones(1),
    "many": torch.ones(5),
    "list": [1.0] * 4,
    "integers": torch.ones(4, dtype=torch.int32),
}


@pytest.mark.parametrize("wrong", WRONG_SCALES.values(), ids=WRONG_SCALES)
def test_scales_that_do_not_fit(wrong, trained):
    optimizer = trained(RULES["Adam"], OPTIONS["8bit"])
    saved = copy.deepcopy(optimizer.state_dict())
    before = snapshot(optimizer)
    saved["state"][3]["exp_avg_scale"] = wrong
    if wrong is None:
        del saved["state"][3]["exp_avg_scale"]
    with pytest.raises(
        ValueError, match="parameter 3 of group 0: the loaded state 'exp_avg_codes' needs 'exp_avg_scale'"
    ):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), before, "after a load that failed")
    p = optimizer.param_groups[0]["params"][3]
    optimizer.state[p]["exp_avg_scale"] = wrong
    with pytest.raises(RuntimeError, match="exp_avg_scale"):
        optimizer.step()
    optimizer.state[p]["exp_avg_scale"] = torch.ones(8)[::2]
    with pytest.raises(RuntimeError, match="contiguous"):
        optimizer.step()


@pytest.mark.parametrize(
    "wrong", [torch.zeros(65, 3), torch.zeros(7, dtype=torch.uint8), [0]], ids=["float", "shape", "list"]
)
def test_codes_that_do_not_fit(wrong, trained):
    optimizer = trained(RULES["Adam"], OPTIONS["8bit"])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][3]["exp_avg_codes"] = wrong
    with pytest.raises(ValueError, match="parameter 3 of group 0: the loaded state 'exp_avg"):
        optimizer.load_state_dict(saved)
    optimizer.state[optimizer.param_groups[0]["params"][3]]["exp_avg_codes"] = wrong
    with pytest.raises(RuntimeError, match="exp_avg_codes"):
        optimizer.step()


def test_a_remainder_that_does_not_fit(trained):
    optimizer = trained(RULES["Adam"], OPTIONS["8bit-32"])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][3]["param_remainder"] = torch.zeros(65, 3)
    with pytest.raises(ValueError, match="parameter 3 of group 0: the loaded state 'param_remainder'"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("options", [o for o in OPTIONS.values() if "state_dtype" in o], ids=str)
def test_a_changed_option_is_noticed(options, trained):
    optimizer = trained(RULES["Adam"], {"stochastic_rounding": False})
    optimizer.param_groups[0].update(options)
    with pytest.raises(RuntimeError, match="converts"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert all(
        optimizer.state[p].get("exp_avg") is None or options.get("state_dtype") != "8bit" for p in optimizer.state
    )


def test_groups_are_the_bindings():
    assert onepass._native.SCALE_GROUP == GROUP
