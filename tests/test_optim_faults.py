"""Faults from outside: whatever raises, interrupts or kills, the state is that from before a step or after it."""

import copy
import functools
import gc
import os
import signal
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import onepass
import pytest
import torch
from onepass.optim import SAM, SGD, Adam, Lookahead, SparseAdam
from rules import RULES
from support import assert_close, assert_same, bits, parameter, snapshot

EVERY_RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
PACKAGE = str(Path(onepass.__file__).parent)
SHAPES = [(5,), (2, 3)]


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [parameter(torch.randn(shape)) for shape in SHAPES]


def set_grads(params, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def bowl(params, optimizer):
    """A closure with a gradient that depends on the weights."""

    def closure():
        optimizer.zero_grad()
        loss = torch.stack([(p - 0.3).square().sum() for p in params]).sum()
        loss.backward()
        return loss

    return closure


def in_groups(params) -> list[dict]:
    return [{"params": [p]} for p in params]


WRAPPED = {
    "Lookahead": lambda params: Lookahead(Adam(in_groups(params), lr=0.1), k=2),
    "quadratic": lambda params: Lookahead(SGD(in_groups(params), lr=0.1, momentum=0.9), 1, "quadratic"),
    "SAM": lambda params: SAM(in_groups(params), Adam, rho=0.1, lr=0.1),
    "ASAM over torch": lambda params: SAM(in_groups(params), torch.optim.Adam, rho=0.1, adaptive=True, lr=0.1),
    "both": lambda params: Lookahead(SAM(in_groups(params), SGD, rho=0.1, lr=0.1), k=1),
}
MAKE = {
    **{name: lambda params, rule=rule: rule.ours(in_groups(params), **rule.usual) for name, rule in RULES.items()},
    "clipping": lambda params: Adam(in_groups(params), lr=0.1, max_norm=0.5),
    **WRAPPED,
}
EVERY_OPTIMIZER = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
EVERY_WRAPPER = pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)


def interrupted(call, line: int) -> bool:
    """Call, raising KeyboardInterrupt at the n-th executed line of this package; False if it ended before that."""
    ran = 0

    def trace(frame, event, _):
        nonlocal ran
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            ran += 1
            if ran == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
        torch.set_grad_enabled(True)  # Python may be interrupted at the end of a `with`, before the mode is set back
    return False


def assert_goes_on(params, optimizer, what: str) -> None:
    """Assert that the next step is that of a new optimizer loaded from this one's checkpoint: there is no other residue."""
    twins = [parameter(p.detach().clone()) for p in params]
    index = {id(p): twin for p, twin in zip(params, twins, strict=True)}
    wrapped = isinstance(optimizer, onepass.optim._wrapper.Wrapper)
    saved = copy.deepcopy(optimizer.state_dict())
    other = copy.deepcopy(optimizer, memo=dict(index))
    other.state.clear()
    other.load_state_dict(saved)
    for ps, o in ((params, optimizer), (twins, other)):
        if wrapped:
            o.step(bowl(ps, o))
        else:
            set_grads(ps, 77)
            o.step()
    assert_same(snapshot(optimizer), snapshot(other), what)


def assert_whole_states(params, optimizer, what: str) -> None:
    """Assert that a parameter has all of its states or none."""
    base = optimizer
    while not isinstance(base, onepass.optim._base.FusedOptimizer):
        if not hasattr(base, "base_optimizer"):
            return
        base = base.base_optimizer
    for group in base.param_groups:
        for p in group["params"]:
            names = {*base._state_names(group), *base.scalar_states}
            assert base.state.get(p, {}).keys() in (set(), names), what


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


# The rules share nearly all of their lines.
@pytest.mark.parametrize("make", [MAKE[name] for name in ("NAdam", "SGD", "clipping", *WRAPPED)])
@pytest.mark.parametrize("stepped", [0, 1], ids=["first step", "second step"])
def test_interrupted_in_any_line(make, stepped):
    """Weights and states are those from before the step, after it, or after the wrapped optimizer's part of it."""

    def start():
        params = parameters()
        optimizer = make(params)
        for t in range(stepped):
            set_grads(params, t)
            optimizer.step(bowl(params, optimizer))
        set_grads(params, 9)
        return params, optimizer, snapshot(optimizer)

    params, optimizer, before = start()
    inside: list = []  # the weights between the wrapped optimizer's step and the wrapper's own work
    base = getattr(optimizer, "base_optimizer", optimizer)
    base.register_step_post_hook(lambda *_: inside.append(weights(params)))
    optimizer.step(bowl(params, optimizer))
    after, after_weights = snapshot(optimizer), weights(params)
    line = 0
    while True:
        line += 1
        params, optimizer, _ = start()
        before_weights = weights(params)
        step = functools.partial(optimizer.step, bowl(params, optimizer))
        if not interrupted(step, line):
            break
        what = f"interrupted in line {line}"
        assert_whole_states(params, optimizer, what)
        assert weights(params) in (before_weights, inside[0], after_weights), what
        if not isinstance(optimizer, Lookahead):  # its slow weights may already exist, or its count may be behind
            assert snapshot(optimizer) in (before, after), what
        assert not getattr(optimizer, "is_perturbed", False), what
        assert_goes_on(params, optimizer, what)
    assert line > 20
    assert_same(snapshot(optimizer), after, "not interrupted")


def weights(params) -> list[bytes]:
    return [bits(p) for p in params]


@pytest.mark.parametrize("half", ["first_step", "second_step"])
def test_sam_by_hand_interrupted_in_any_line(half):
    """Either the old weights, or perturbed ones with is_perturbed set, which second_step() restores."""
    line = 0
    while True:
        line += 1
        params = parameters()
        optimizer = SAM(in_groups(params), SGD, rho=0.5, lr=0.0)
        for t in range(2):
            set_grads(params, t)
            optimizer.first_step()
            optimizer.second_step()
        before = weights(params)
        if half == "second_step":
            optimizer.first_step()
        perturbed = weights(params)
        if not interrupted(getattr(optimizer, half), line):
            break
        what = f"interrupted in line {line}"
        if not optimizer.is_perturbed:
            assert weights(params) == before, what
            optimizer.first_step()
        elif half == "second_step":
            assert weights(params) in (before, perturbed), what
        else:
            assert weights(params) != before, what
        saved = copy.deepcopy(optimizer.state_dict())
        assert all("old_param" in saved["state"][i] for i in range(2)), what
        optimizer.second_step()
        assert weights(params) == before, what
        assert_goes_on(params, optimizer, what)
    assert line > 20


def interrupt_by_signals(name: str) -> None:
    params = parameters()
    optimizer = MAKE[name](params)
    closure = bowl(params, optimizer)
    if name == "ASAM over torch":
        optimizer.step(closure)  # torch's own optimizer has half a state if interrupted in its first step
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    interrupts = 0
    try:
        for i in range(40):
            try:
                # Repeated after half a second, in case Python swallows the first one in a destructor.
                signal.setitimer(signal.ITIMER_REAL, 0.0004 * (1 + i % 13), 0.5)
                while True:
                    optimizer.step(closure)
            except KeyboardInterrupt:
                signal.setitimer(signal.ITIMER_REAL, 0)
                interrupts += 1
                torch.set_grad_enabled(True)
            assert not getattr(optimizer, "is_perturbed", False)
            assert_whole_states(params, optimizer, f"interrupt {i}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts == 40
    counts = {group.get("lookahead_step", 0) for group in optimizer.param_groups}
    optimizer.step(closure)
    assert len({group.get("lookahead_step", 0) for group in optimizer.param_groups}) == 1
    assert max(counts) < optimizer.param_groups[0].get("lookahead_step", 1)
    assert all(p.isfinite().all() for p in params)
    assert_goes_on(params, optimizer, "after 40 interrupts")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers")
def test_interrupted_by_signals():
    """The same by a signal, wherever torch or Python is at that moment; in a separate process."""
    child = python(
        """
        from test_optim_faults import MAKE, interrupt_by_signals
        for name in MAKE:
            interrupt_by_signals(name)
        """
    )
    assert child.returncode == 0, child.stderr


# ---- exceptions of the user's code -----------------------------------------------------------------------------------


class Fault(Exception):
    pass


def fail(*_, **__):
    raise Fault


@pytest.mark.parametrize("stepped", [0, 2])
@pytest.mark.parametrize("where", ["closure", "step pre hook", "parametrisation", "backward hook"])
@EVERY_OPTIMIZER
def test_an_exception_before_the_step(make, where, stepped):
    """Nothing has changed, neither state nor count; the next step is undisturbed."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    armed = []

    class Sometimes(torch.nn.Module):
        def forward(self, weight):
            if armed and where == "parametrisation":
                raise Fault
            return weight * 2

    torch.nn.utils.parametrize.register_parametrization(model, "weight", Sometimes())
    params = list(model.parameters())
    optimizer = make(params)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).square().mean()
        if armed and where == "backward hook":
            loss.register_hook(fail)
        loss.backward()
        if armed and where == "closure":
            raise Fault
        return loss

    for _ in range(stepped):
        optimizer.step(closure)
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    armed.append(1)
    handle = optimizer.register_step_pre_hook(fail) if where == "step pre hook" else None
    with pytest.raises(Fault):
        optimizer.step(closure)
    assert_same(snapshot(optimizer), before, f"after an exception in the {where}")
    assert optimizer.state_dict()["param_groups"] == groups
    armed.clear()
    if handle is not None:
        handle.remove()
    assert_goes_on(params, optimizer, "the next step")


@EVERY_OPTIMIZER
def test_an_exception_after_the_step(make):
    """A step post hook: the step has taken place, with its count."""
    params, twins = parameters(), parameters()
    optimizer, other = make(params), make(twins)
    handle = optimizer.register_step_post_hook(fail)
    with pytest.raises(Fault):
        optimizer.step(bowl(params, optimizer))
    other.step(bowl(twins, other))
    assert_same(snapshot(optimizer), snapshot(other), "the step before the exception")
    handle.remove()
    assert_goes_on(params, optimizer, "the next step")


@EVERY_WRAPPER
def test_an_exception_of_the_wrapped_optimizer(make):
    """Raised before its step, nothing has changed; raised after it, the weights are complete and the wrapper continues."""
    for register in ("register_step_pre_hook", "register_step_post_hook"):
        params = parameters()
        optimizer = make(params)
        optimizer.step(bowl(params, optimizer))
        before = snapshot(optimizer)
        handle = getattr(optimizer.base_optimizer, register)(fail)
        with pytest.raises(Fault):
            optimizer.step(bowl(params, optimizer))
        assert not getattr(optimizer, "is_perturbed", False)
        if register == "register_step_pre_hook":
            assert_same(snapshot(optimizer), before, "after the exception")
        handle.remove()
        assert_goes_on(params, optimizer, "the next step")


@pytest.mark.parametrize("when", ["pre", "post"])
@pytest.mark.parametrize("inner", [False, True], ids=["own", "wrapped optimizer's"])
@EVERY_OPTIMIZER
def test_an_exception_in_a_load_hook(make, when, inner):
    """Raised before the load, nothing has changed; raised after it, everything is loaded. The next load works."""
    source, params = parameters(), parameters()
    saved = make(source)
    for _ in range(3):
        saved.step(bowl(source, saved))
    state = copy.deepcopy(saved.state_dict())
    optimizer = make(params)
    optimizer.step(bowl(params, optimizer))
    before = snapshot(optimizer)
    hooked = getattr(optimizer, "base_optimizer", optimizer) if inner else optimizer
    handle = getattr(hooked, f"register_load_state_dict_{when}_hook")(fail)
    with pytest.raises(Fault):
        optimizer.load_state_dict(state)
    handle.remove()
    if when == "pre":
        assert_same(snapshot(optimizer), before, "after the exception")
        optimizer.load_state_dict(state)
    came, expected = snapshot(optimizer), snapshot(saved)
    for key, value in expected.items():
        if not key.startswith("parameter"):
            assert came[key] == value, f"{key} after loading"
    assert_goes_on(params, optimizer, "the next step")


@EVERY_OPTIMIZER
def test_nothing_is_kept_after_an_exception(make):
    """Parameters, gradients and states are freed with the optimizer."""
    params = parameters()
    optimizer = make(params)
    optimizer.step(bowl(params, optimizer))
    for register in (optimizer.register_step_post_hook, optimizer.register_load_state_dict_pre_hook):
        handle = register(fail)
        try:
            optimizer.step(bowl(params, optimizer))
            optimizer.load_state_dict(optimizer.state_dict())
        except Fault:
            pass
        handle.remove()
    refs = [
        weakref.ref(t) for p in params for t in (p, p.grad, *optimizer.state[p].values()) if isinstance(t, torch.Tensor)
    ]
    refs.append(weakref.ref(optimizer))
    del params, optimizer, register, handle
    gc.collect()
    assert [r() for r in refs] == [None] * len(refs)


# ---- memory runs out -------------------------------------------------------------------------------------------------


# torch's own optimizers leave half a state behind.
@pytest.mark.parametrize("make", [make for name, make in MAKE.items() if name != "ASAM over torch"])
def test_no_memory_for_states(make, monkeypatch):
    """At any allocation of the first step: no state and the old weights remain; the next step is the first one."""
    twins = parameters()
    clean = make(twins)
    clean.step(bowl(twins, clean))
    failed = 0
    while True:
        calls = 0

        def sometimes(*args, real, at=failed, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at + 1:
                raise MemoryError
            return real(*args, **kwargs)

        params = parameters()
        optimizer = make(params)
        before = snapshot(optimizer)
        with monkeypatch.context() as patch:
            for name in ("full_like", "zeros_like", "empty_like", "tensor", "zeros"):
                real = getattr(torch, name)
                patch.setattr(torch, name, lambda *a, real=real, f=sometimes, **k: f(*a, real=real, **k))
            try:
                optimizer.step(bowl(params, optimizer))
                break
            except MemoryError:
                failed += 1
        came = snapshot(optimizer)
        what = f"no memory in allocation {failed}"
        assert_whole_states(params, optimizer, what)
        assert not getattr(optimizer, "is_perturbed", False)
        if isinstance(optimizer, onepass.optim._base.FusedOptimizer):
            assert_same(came, before, what)
            assert not optimizer.state
            optimizer.step(bowl(params, optimizer))
            assert_same(snapshot(optimizer), snapshot(clean), f"the step after {what}")
        else:
            assert_goes_on(params, optimizer, f"the step after {what}")
    assert failed > 0 or not clean.state


def test_no_memory_for_shared_states(monkeypatch):
    params = parameters()
    optimizer = onepass.optim.Adagrad(params, lr=0.1)
    monkeypatch.setattr(torch, "full_like", fail)
    with pytest.raises(Fault):
        optimizer.share_memory()
    assert not optimizer.state
    monkeypatch.undo()
    optimizer.share_memory()
    assert all(optimizer.state[p]["sum"].is_shared() for p in params)


# ---- gradients that are not finite -----------------------------------------------------------------------------------


@EVERY_RULE
def test_nan_in_one_group(rule):
    """It stays in its group: parameters and states of the other group are those of a separate step."""
    params, alone = parameters(), parameters()[1:]
    optimizer, other = rule.ours(in_groups(params), **rule.usual), rule.ours(in_groups(alone), **rule.usual)
    for t in range(4):
        set_grads(params, t)
        alone[0].grad = params[1].grad.clone()
        if t == 1:
            params[0].grad[2] = float("nan")
        optimizer.step()
        other.step()
    assert bits(params[1]) == bits(alone[0])
    for name, state in other.state[alone[0]].items():
        assert bits(optimizer.state[params[1]][name]) == bits(state), name
    finite = params[0].isfinite()
    assert finite[[0, 1, 3, 4]].all(), "the elements beside it"
    assert all(optimizer.state[p].get("step", torch.tensor(4.0)) == 4 for p in params)


def test_nan_in_one_group_under_clipping():
    """The norm is over all groups, so it is NaN, and so is every gradient that it scales."""
    params = parameters()
    optimizer = SGD(in_groups(params), lr=0.1, max_norm=1.0)
    set_grads(params, 0)
    params[0].grad[2] = float("nan")
    optimizer.step()
    assert optimizer.grad_norm.isnan()
    assert all(p.isnan().all() for p in params)


def test_nan_in_one_group_under_a_scaler():
    """The scaler checks all groups and skips the step of all."""
    params = parameters()
    optimizer = Adam(in_groups(params), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = snapshot(optimizer)
    scaler.scale(torch.zeros(()))
    set_grads(params, 0)
    params[0].grad[2] = float("nan")
    scaler.step(optimizer)
    scaler.update()
    assert_same(snapshot(optimizer), before, "skipped")


@pytest.mark.parametrize("make", [WRAPPED["Lookahead"], WRAPPED["SAM"]])
def test_nan_under_a_wrapper(make):
    """SAM restores its weights bit for bit; Lookahead's slow weights are NaN only where a weight was NaN."""
    params = parameters()
    optimizer = make(params)
    before = weights(params)
    set_grads(params, 0)
    params[0].grad[2] = float("nan")
    if isinstance(optimizer, SAM):
        optimizer.first_step()
        seen = []
        optimizer.base_optimizer.register_step_pre_hook(lambda *_: seen.extend(weights(params)))
        set_grads(params, 1)
        optimizer.second_step()
        assert seen == before
        assert all(p.isfinite().all() for p in params)
    else:
        optimizer.step()
        set_grads(params, 1)
        optimizer.step()
        slow = [optimizer.state[p]["slow_param"] for p in params]
        assert slow[0].isnan().tolist() == [False, False, True, False, False]
        assert slow[1].isfinite().all()


# ---- processes -------------------------------------------------------------------------------------------------------


def python(code: str, *args: str) -> subprocess.CompletedProcess:
    """Run code in a separate process, with this package; a minute is more than it needs."""
    path = os.pathsep.join([str(Path(onepass.__file__).parent.parent), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("name", ["AdamW", "Lookahead", "SAM"])
def test_killed_while_a_checkpoint_is_written(name, tmp_path):
    """With a second file and os.replace the previous checkpoint stays complete, and training continues from it."""
    child = python(
        """
        import os, signal, sys, torch
        from test_optim_faults import MAKE, bowl, parameters

        class Deadly:
            def __init__(self, file):
                self.file, self.left = file, 700
            def write(self, data):
                self.left -= len(data)
                self.file.write(data)
                if self.left < 0:
                    self.file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
                return len(data)
            def flush(self):
                self.file.flush()

        name, path = sys.argv[1:]
        params = parameters()
        optimizer = MAKE[name](params)
        for step in range(1, 5):
            optimizer.step(bowl(params, optimizer))
            content = {"step": step, "params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}
            with open(path + ".part", "wb") as file:
                torch.save(content, Deadly(file) if step == 4 else file)
            os.replace(path + ".part", path)
        """,
        name,
        str(tmp_path / "checkpoint"),
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert (tmp_path / "checkpoint.part").exists(), "it was killed while it wrote"
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    assert saved["step"] == 3
    params = [parameter(p) for p in saved["params"]]
    optimizer = MAKE[name](params)
    optimizer.load_state_dict(saved["optimizer"])
    twins = parameters()
    straight = MAKE[name](twins)
    for _ in range(3):
        straight.step(bowl(twins, straight))
    for _ in range(3):
        optimizer.step(bowl(params, optimizer))
        straight.step(bowl(twins, straight))
    assert_same(snapshot(optimizer), snapshot(straight), "resumed")


WORKER = """
    import atexit, sys, threading, torch
    from test_optim_faults import MAKE, bowl
    from support import parameter

    params = [parameter(torch.randn(300_000)) for _ in range(2)]
    optimizer = MAKE[sys.argv[1]](params)
    closure, steps, end = bowl(params, optimizer), threading.Semaphore(0), threading.Event()

    def work():
        while not end.is_set():
            optimizer.step(closure)
            steps.release()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    for _ in range(3):
        steps.acquire()
"""


@pytest.mark.parametrize("name", ["AdamW", "SAM"])
def test_exit_while_a_daemon_thread_steps(name):
    """A thread that is told to end at exit ends. Otherwise nothing hangs.

    CPython up to 3.13 ends such a thread when it asks for the GIL; inside C++ that aborts the process. The same happens to
    a thread that steps torch's own optimizer.
    """
    told = python(WORKER + "    atexit.register(lambda: (end.set(), thread.join()))", name)
    assert told.returncode == 0, told.stderr
    alone = python(WORKER, name)
    assert alone.returncode in (0, -signal.SIGABRT), alone.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_after_parallel_steps():
    """A child of a multi-threaded process steps on one thread, as torch requires, with the same bits."""
    child = python(
        """
        import os, sys, torch
        from support import bits, parameter
        from onepass.optim import AdamW

        torch.set_num_threads(4)
        params = [parameter(torch.linspace(-1, 1, 3_000_000)) for _ in range(2)]
        optimizer = AdamW(params, lr=0.1, max_norm=1.0)
        def step():
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        step()
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            before = torch.stack([p.detach() for p in params])
            step()
            steps = {optimizer.state[p]["step"].item() for p in params}
            moved = (before - torch.stack([p.detach() for p in params])).abs().min().item()
            os._exit(0 if steps == {2.0} and moved > 0 else 1)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, status
        step()
        assert {optimizer.state[p]["step"].item() for p in params} == {2.0}
        """
    )
    assert child.returncode == 0, child.stderr


def test_sparse_gradients_that_point_outside():
    """With an index out of range in the second table neither table is changed."""
    tables = [parameter(torch.ones(4, 2)) for _ in range(2)]
    optimizer = SparseAdam(tables, lr=0.1)
    for table, row in zip(tables, (1, 9), strict=True):
        index = torch.tensor([[row]])
        table.grad = torch.sparse_coo_tensor(index, torch.ones(1, 2), (4, 2), check_invariants=False)
    with pytest.raises(RuntimeError, match="size is inconsistent with indices"):
        optimizer.step()
    assert not optimizer.state
    for table in tables:
        assert_close(table, torch.ones(4, 2), 0.0, "the table")
