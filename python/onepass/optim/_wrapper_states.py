"""The states of a wrapper and of the optimizer inside it: kept without keeping parameters alive, shown as one mapping."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import _compat

if TYPE_CHECKING:
    from ._wrapper import Wrapper

State = dict[Tensor, dict[str, Tensor]]


class WeakStates:
    """The states of a wrapper by parameter. They keep no parameter alive and disappear with it.

    The key is id(), because the hash of a tensor is a call into Python. This is safe: the callback of the weak reference
    removes the entry before another object can get the same id. Parameters whose memory torch may swap
    (torch.utils.swap_tensors) cannot have weak references; they are held until keep_only() drops them.
    """

    def __init__(self, states: State | None = None) -> None:
        self._entries: dict[int, tuple[object, dict[str, Tensor]]] = {}

        this = weakref.ref(self)  # a strong reference would be a cycle and delay the release of the states

        def forget(dead: weakref.KeyedRef[int, Tensor]) -> None:
            states = this()
            if states is not None:
                states._entries.pop(dead.key, None)

        self._forget = forget
        for param, state in (states or {}).items():
            self[param] = state

    def __setitem__(self, param: Tensor, state: dict[str, Tensor]) -> None:
        key = id(param)
        hold = param if _compat.may_be_swapped(param) else weakref.KeyedRef(param, self._forget, key)
        self._entries[key] = (hold, state)

    def get(self, param: Tensor) -> dict[str, Tensor] | None:
        entry = self._entries.get(id(param))
        return None if entry is None else entry[1]

    def get_or_make(self, param: Tensor) -> dict[str, Tensor]:
        state = self.get(param)
        if state is None:
            state = self[param] = {}
        return state

    def pop(self, param: Tensor) -> None:
        self._entries.pop(id(param), None)

    def keep_only(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Drop the states of all other parameters. Gives those of `params` that have none."""
        by_id = {id(param): param for param in params}
        if self._entries.keys() == by_id.keys():
            return []
        for key in self._entries.keys() - by_id.keys():
            self._entries.pop(key, None)
        return [param for key, param in by_id.items() if key not in self._entries]


class StateOfParameter(MutableMapping[str, Any]):
    """The states of one parameter: the wrapped optimizer's and, under its name, the wrapper's. Writes go to their owner.

    Made from a mapping alone, as code does that rebuilds containers by their type, it shows that mapping.
    """

    __slots__ = ("_base", "_param", "_wrapper")

    def __init__(
        self, base: MutableMapping[str, Any], wrapper: Wrapper | None = None, param: Tensor | None = None
    ) -> None:
        self._base, self._wrapper, self._param = base, wrapper, param

    def _home(self, name: str, make: bool = False) -> MutableMapping[str, Any]:
        """The dict that holds a state of this name."""
        if self._wrapper is None or self._param is None or name != self._wrapper.kept:
            return self._base
        return self._wrapper._state_of(self._param, make)

    def __getitem__(self, name: str) -> Any:
        return self._home(name)[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._home(name, make=True)[name] = value

    def __delitem__(self, name: str) -> None:
        if name not in self._home(name):
            raise KeyError(name)
        if self._home(name) is self._base:
            del self._base[name]
        elif self._wrapper is not None and self._param is not None:
            self._wrapper._drop_state(self._param)

    def __iter__(self) -> Iterator[str]:
        kept = None if self._wrapper is None else self._wrapper.kept
        yield from (name for name in self._base if name != kept)
        if kept is not None and kept in self._home(kept):
            yield kept

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> Any:  # a copy is a dict
        return dict, (dict(self),)


class States(MutableMapping[Tensor, Any]):
    """The value of `wrapper.state`: the states of both optimizers for each parameter, live and writable.

    As in the defaultdict of torch.optim, a lookup for a parameter without states makes an empty entry.
    """

    __slots__ = ("_wrapper",)

    def __init__(self, wrapper: Wrapper) -> None:
        self._wrapper = wrapper

    @property
    def _base(self) -> MutableMapping[Tensor, Any]:
        return self._wrapper.base_optimizer.state

    def __getitem__(self, param: Tensor) -> Any:
        base = self._base[param]
        return StateOfParameter(base, self._wrapper, param) if isinstance(base, MutableMapping) else base

    def __setitem__(self, param: Tensor, states: Any) -> None:
        if not isinstance(states, Mapping):  # torch.optim allows anything under keys of any kind
            self._base[param] = states
            return
        content, kept = dict(states), self._wrapper.kept
        own = {kept: content.pop(kept)} if kept in content else {}
        if own:
            self._wrapper._state_of(param, make=True).update(own)
        else:
            self._wrapper._drop_state(param)
        self._base[param] = content

    def __delitem__(self, param: Tensor) -> None:
        if param not in self:
            raise KeyError(param)
        self._base.pop(param, None)
        self._wrapper._drop_state(param)

    def __iter__(self) -> Iterator[Tensor]:
        base = self._base
        yield from base
        yield from (param for param in self._wrapper._kept_state() if param not in base)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, param: object) -> bool:
        if param in self._base:
            return True
        return isinstance(param, Tensor) and self._wrapper.kept in self._wrapper._state_of(param)

    def get(self, param: Tensor, default: Any = None) -> Any:
        if param not in self:
            return default
        return self[param]

    def pop(self, param: Tensor, *default: Any) -> Any:
        """Remove the states of a parameter and return them as a dict."""
        if param not in self and default:
            return default[0]
        if param not in self:
            raise KeyError(param)
        states = self[param]
        content = dict(states) if isinstance(states, Mapping) else states
        del self[param]
        return content

    def popitem(self) -> tuple[Tensor, Any]:
        for param in self:
            return param, self.pop(param)
        raise KeyError("popitem(): dictionary is empty")

    def clear(self) -> None:
        for param in self._wrapper._kept_state():
            self._wrapper._drop_state(param)
        self._base.clear()

    def replace(self, states: Mapping[Tensor, Any]) -> None:
        """Assign new states, as to `optimizer.state`."""
        content = {param: dict(of) if isinstance(of, Mapping) else of for param, of in states.items()}
        self.clear()
        self._wrapper.base_optimizer.state = defaultdict(dict)
        self.update(content)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> Any:  # a copy is a dict
        return dict, ({param: self[param] for param in self},)


def params_of(groups: list[dict[str, Any]]) -> list[Tensor]:
    """The parameters in the groups, in order and without duplicates: torch lets a group list one twice."""
    params = [param for group in groups for param in group["params"]]
    return params if len(set(map(id, params))) == len(params) else list({id(p): p for p in params}.values())
