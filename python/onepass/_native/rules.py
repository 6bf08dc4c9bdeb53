"""The rules in this build, as their files in csrc/rules describe them."""

from __future__ import annotations

import functools
from typing import NamedTuple

from .. import _C


class RuleVariant(NamedTuple):
    """One kernel of a rule: a rule has a variant for each set of memory streams that its options choose.

    Attributes:
        rule: name of the rule, a file in csrc/rules.
        hyper_names: its hyper-parameters, in the order in which the kernel takes them.
        states: the states of one value per element, in the rule's order.
        kinds: what each state's values are: "signed", "square" (never negative), "exact" or "float32"; see csrc/core/rule.hpp.
        carried: the 0-d states that it keeps beside the step count.
        reads_grad: whether it reads gradients.
        takes_rows: whether it can update only the rows that a sparse gradient has.
    """

    rule: str
    hyper_names: tuple[str, ...]
    states: tuple[str, ...]
    kinds: tuple[str, ...]
    carried: tuple[str, ...]
    reads_grad: bool
    takes_rows: bool


_VARIANTS = [RuleVariant(*fields) for fields in _C.rules()]
_INDEX = {(variant.rule, variant.states, variant.reads_grad): index for index, variant in enumerate(_VARIANTS)}


def rules() -> tuple[str, ...]:
    """Names of the rules in this build."""
    return tuple({variant.rule: None for variant in _VARIANTS})


@functools.cache
def variants(rule: str) -> tuple[RuleVariant, ...]:
    """The variants of a rule."""
    return tuple(variant for variant in _VARIANTS if variant.rule == rule)


def find_variant(rule: str, states: tuple[str, ...], reads_grad: bool = True) -> tuple[int, RuleVariant]:
    """The variant with these states, and its index in the extension."""
    index = _INDEX[rule, states, reads_grad]
    return index, _VARIANTS[index]


@functools.cache
def state_names(rule: str) -> tuple[str, ...]:
    """Every state that some variant of the rule has."""
    return tuple({name: None for variant in variants(rule) for name in variant.states})


@functools.cache
def foreign_states(rule: str) -> frozenset[str]:
    """States that other rules have and this one has not."""

    def all_states(rule: str) -> set[str]:
        return {*state_names(rule), *variants(rule)[0].carried}

    others = {name for other in rules() for name in all_states(other)}
    return frozenset(others - all_states(rule))
