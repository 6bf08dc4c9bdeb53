"""What the demo's networks learn; all of it is there offline."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]


class Data(Protocol):
    def batches(self, quick: bool) -> Iterator[Batch]: ...

    def steps(self, quick: bool) -> int: ...

    def test(self) -> Batch: ...


class Digits:
    """8 x 8 images of handwritten digits; a fifth is held out for the test."""

    batch = 64

    def __init__(self) -> None:
        import sklearn.datasets  # type: ignore[import-untyped]

        pixels, digits = sklearn.datasets.load_digits(return_X_y=True)
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
        images, labels = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(digits)[order]
        test = len(labels) // 5
        self.train_images, self.train_labels = images[test:], labels[test:]
        self.test_images, self.test_labels = images[:test], labels[:test]

    def batches(self, quick: bool) -> Iterator[Batch]:
        shuffle = torch.Generator().manual_seed(1)
        for _ in range(3 if quick else 40):
            order = torch.randperm(len(self.train_labels), generator=shuffle)
            for batch in order.tensor_split(len(order) // self.batch):
                yield self.train_images[batch], self.train_labels[batch]

    def steps(self, quick: bool) -> int:
        return (3 if quick else 40) * (len(self.train_labels) // self.batch)

    def test(self) -> Batch:
        return self.test_images, self.test_labels


def digits() -> Digits | None:
    """The digits if scikit-learn, which has them, is installed."""
    return Digits() if importlib.util.find_spec("sklearn") else None


class HelpText:
    """The text of Python's help, which depends on the Python version; its last twentieth is held out for the test.

    The targets of a piece of text are the characters that follow its characters, or only the one that follows the last.
    """

    def __init__(self, context: int = 64, batch: int = 16, last_only: bool = False) -> None:
        self.context, self.batch, self.last_only = context, batch, last_only
        try:
            from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]

            text = "\n".join(topics[name] for name in sorted(topics))
        except ImportError:  # some distributions leave it out
            text = inspect.getsource(inspect)
        self.name = f"{len(text)} characters of help, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"
        characters = sorted(set(text))
        self.alphabet, self.characters = "".join(characters), len(characters)
        number = {character: i for i, character in enumerate(characters)}
        numbers = torch.tensor([number[character] for character in text])
        self.train, self.held_out = numbers[: -len(text) // 20], numbers[-len(text) // 20 :]

    def _cut(self, text: Tensor, starts: Tensor) -> Batch:
        pieces = text[starts.unsqueeze(1) + torch.arange(self.context + 1)]
        return pieces[:, :-1], pieces[:, -1] if self.last_only else pieces[:, 1:].flatten()

    def batches(self, quick: bool) -> Iterator[Batch]:
        shuffle = torch.Generator().manual_seed(1)
        for _ in range(self.steps(quick)):
            yield self._cut(self.train, torch.randint(len(self.train) - self.context, (self.batch,), generator=shuffle))

    def steps(self, quick: bool) -> int:
        return 40 if quick else 400

    def test(self) -> Batch:
        return self._cut(self.held_out, torch.arange(0, len(self.held_out) - self.context - 1, self.context))
