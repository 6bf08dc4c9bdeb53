"""Parameters, gradients and states of any strides are updated correctly and in place; nothing around them changes."""

import pytest
import torch
from layouts import LAYOUTS, assert_only_view_written, in_layout
from rules import RULES, BesideReference
from support import bits, parameter

SHAPE = (3, 4, 5, 2)
STEPS = 4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_parameters_in_any_layout(rule, layout, dtype, device):
    """A parameter in the layout between dense ones; gradients are made with its zeros_like."""
    base, view = in_layout(layout, torch.randn(SHAPE, device=device).to(dtype))
    odd = parameter(view)
    assert odd.stride() == view.stride()
    assert odd.data_ptr() == view.data_ptr()
    params = [
        parameter(torch.randn(7, device=device).to(dtype)),
        odd,
        parameter(torch.ones(9, device=device, dtype=dtype)),
    ]
    both = BesideReference(rule, {**rule.usual, "max_norm": 2.0}, params)
    for _ in range(STEPS):
        both.step([torch.randn_like(p) for p in params])
    assert (odd.stride(), odd.data_ptr()) == (view.stride(), view.data_ptr()), "the parameter was moved"
    assert_only_view_written(base, view, layout)


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_second_column"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_gradients_in_another_layout(rule, layout, grad_layout, device):
    _, view = in_layout(layout, torch.randn(SHAPE, device=device))
    both = BesideReference(rule, {**rule.usual, "max_norm": 2.0}, [parameter(view)])
    for _ in range(STEPS):
        both.step([in_layout(grad_layout, torch.randn(SHAPE, device=device))[1]])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_expanded_gradients(rule, layout, dtype, device):
    """Stride 0, as from sum().backward(), in all dimensions and in some."""
    _, view = in_layout(layout, torch.randn(SHAPE, device=device).to(dtype))
    both = BesideReference(rule, {**rule.usual, "max_norm": 0.5}, [parameter(view)])
    for shape in ((1, 1, 1, 1), (3, 1, 1, 2), (1, 4, 5, 1)):
        grad = torch.randn(shape, device=device).to(dtype).expand(SHAPE)
        assert 0 in grad.stride()
        both.step([grad])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_gradient_of_sum(rule, device):
    """The expanded gradient that autograd itself makes."""
    p = parameter(torch.randn(33, device=device))
    both = BesideReference(rule, rule.usual, [p])
    for _ in range(2):
        (grad,) = torch.autograd.grad(p.sum(), p)
        both.step([grad])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_interleaved_parameters(rule, device):
    """Two parameters alternate in one storage, element by element, large enough for two threads."""
    base = torch.randn(2 * 1_100_000, device=device)
    params = [parameter(base[0::2]), parameter(base[1::2])]
    both = BesideReference(rule, rule.usual, params)
    both.step([torch.randn_like(p) for p in params])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_strides_of_dimensions_of_size_one(rule, device):
    """They have no meaning: these tensors are dense."""
    p = parameter(torch.randn(6, device=device).as_strided((1, 6, 1), (99, 1, 7)))
    both = BesideReference(rule, rule.usual, [p])
    both.step([torch.randn(1, 6, 1, device=device)])
    both.step([torch.randn(6, device=device).as_strided((1, 6, 1), (0, 1, 0))])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_parameter_becomes_channels_last_in_training(rule, device):
    """model.to(memory_format=channels_last) after the first step: the states keep their own strides."""
    p = parameter(torch.randn(SHAPE, device=device))
    both = BesideReference(rule, rule.usual, [p])
    both.step([torch.randn(SHAPE, device=device)])
    p.data = p.data.to(memory_format=torch.channels_last)
    for _ in range(STEPS):
        both.step([torch.randn_like(p)])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_state_loaded_in_another_layout(rule, device):
    """Training continues in a channels_last model from a checkpoint of a contiguous one."""
    p = parameter(torch.randn(SHAPE, device=device).to(memory_format=torch.channels_last))
    both = BesideReference(rule, rule.usual, [p])
    both.step([torch.randn_like(p)])
    saved = both.optimizer.state_dict()
    saved["state"] = {
        i: {k: v.contiguous() if v.dim() else v for k, v in state.items()} for i, state in saved["state"].items()
    }
    both.optimizer.load_state_dict(saved)
    for _ in range(STEPS):
        both.step([torch.randn_like(p)])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_states_have_the_parameters_strides(rule, device):
    """Strides as from zeros_like, for a dense parameter the same, so that the fast path is taken."""
    for layout in ("contiguous", "channels_last", "transposed"):
        p = parameter(in_layout(layout, torch.randn(SHAPE, device=device))[1])
        p.grad = torch.randn_like(p)
        optimizer = rule.ours([p], **rule.usual)
        optimizer.step()
        for key, value in optimizer.state[p].items():
            if key not in optimizer.scalar_states:
                assert value.stride() == p.stride(), f"{layout}: {p.stride()} expected, {key} has {value.stride()}"


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_two_parameters_share_a_gradient(rule, device):
    """Legal, as in torch: the gradient is only read."""
    params = [parameter(torch.randn(50, device=device)) for _ in range(2)]
    grad = torch.randn(50, device=device)
    both = BesideReference(rule, {**rule.usual, "max_norm": 0.5}, params)
    both.step([grad, grad])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_lazy_negation_and_conjugation(rule, device):
    """The values of a view with the neg or conj bit set differ from those in its memory."""
    z = torch.randn(6, dtype=torch.complex64, device=device)
    negated = z.conj().imag
    assert negated.is_neg()
    assert z.conj().is_conj()
    for p, grad in (
        (parameter(torch.randn(6, device=device)), negated),
        (parameter(torch.randn(6, dtype=torch.complex64, device=device)), z.conj()),
    ):
        before, grad_before = bits(p), bits(grad.resolve_neg().resolve_conj())
        both = BesideReference(rule, rule.usual, [p])
        try:
            both.step([grad])
        except RuntimeError:
            assert bits(p) == before, "refused, but written"
        assert bits(grad.resolve_neg().resolve_conj()) == grad_before, "the gradient was written"
