"""onepass and torch on real data: the same losses, less time.

Two networks learn to read handwritten digits (from scikit-learn); a third, a character GPT, learns the text of Python's
help. Nothing is downloaded. Each is trained twice from the same seed on the same batches: once with torch on its fastest
path, once with onepass. The change is two lines, the second only for networks with norms or dropout:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    optimizer = onepass.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model = onepass.convert(model)

Prints a table, checks that the losses agree, and plots both in one figure.

    python examples/demo.py [--quick] [--out demo.png]
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import onepass
import sklearn.datasets  # type: ignore[import-untyped]
import torch
from demo_networks import CharacterGPT, cnn, mlp
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

BATCH = 64
MAX_NORM = 1.0
# Two float32 programs that round differently drift apart, because training amplifies the last bit of a weight: here to
# about 1e-6 in the loss, also between torch's own paths. Another seed changes the loss by 1e-1.
LOSS_TOLERANCE = 1e-4
# With dropout the two draw different masks, as two seeds of torch would: the curves agree on average only.
MASK_TOLERANCE = 0.1

Step = Callable[[], object]
Batch = tuple[Tensor, Tensor]


def sgd_torch(model: nn.Module) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    return optimizer.step


def sgd_onepass(model: nn.Module) -> Step:
    optimizer = onepass.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return optimizer.step


def adamw_torch(model: nn.Module) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def clip_and_step() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()

    return clip_and_step


def adamw_onepass(model: nn.Module) -> Step:
    optimizer = onepass.optim.AdamW(model.parameters(), lr=1e-3, max_norm=MAX_NORM)  # clips inside the step
    return optimizer.step


@dataclass
class Run:
    """One network trained by one library."""

    model: nn.Module
    step: Step
    losses: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    def learn(self, inputs: Tensor, targets: Tensor) -> None:
        begin = time.perf_counter()
        self.model.zero_grad()
        loss = nn.functional.cross_entropy(self.model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        start = time.perf_counter()
        self.step()
        end = time.perf_counter()
        self.optimizer_seconds.append(end - start)
        self.step_seconds.append(end - begin)
        self.losses.append(loss.item())

    @torch.no_grad()
    def test(self, inputs: Tensor, targets: Tensor) -> None:
        self.model.eval()
        self.accuracy = (self.model(inputs).argmax(1) == targets).double().mean().item()

    # The median over the steps, because other processes on the machine distort the mean.
    @property
    def optimizer_ms(self) -> float:
        return 1e3 * statistics.median(self.optimizer_seconds)

    @property
    def step_ms(self) -> float:
        return 1e3 * statistics.median(self.step_seconds)


class Data(Protocol):
    def batches(self, quick: bool) -> Iterator[Batch]: ...

    def steps(self, quick: bool) -> int: ...

    def test(self) -> Batch: ...


@dataclass
class Comparison:
    """One network trained on the same batches by both libraries."""

    network: str
    optimizer: str
    data: Data
    torch: Run
    onepass: Run
    dropout: bool = False

    @property
    def ratio(self) -> float:
        return self.torch.optimizer_ms / self.onepass.optimizer_ms

    @property
    def loss_difference(self) -> float:
        """The largest over all steps; with dropout the relative difference of the means over the last quarter."""
        difference = np.subtract(self.torch.losses, self.onepass.losses)
        if self.dropout:
            last = len(difference) // 4 + 1
            return float(abs(difference[-last:].mean()) / np.mean(self.torch.losses[-last:]))
        return float(np.abs(difference).max())

    @property
    def agrees(self) -> bool:
        return self.loss_difference <= (MASK_TOLERANCE if self.dropout else LOSS_TOLERANCE)


class Digits:
    """8 x 8 images of handwritten digits; a fifth is held out for the test."""

    def __init__(self) -> None:
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
            for batch in order.tensor_split(len(order) // BATCH):
                yield self.train_images[batch], self.train_labels[batch]

    def steps(self, quick: bool) -> int:
        return (3 if quick else 40) * (len(self.train_labels) // BATCH)

    def test(self) -> Batch:
        return self.test_images, self.test_labels


class HelpText:
    """The text of Python's help, which depends on the Python version; its last twentieth is held out for the test."""

    context = 64

    def __init__(self) -> None:
        try:
            from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]

            text = "\n".join(topics[name] for name in sorted(topics))
        except ImportError:  # some distributions leave it out
            text = inspect.getsource(argparse)
        self.name = f"{len(text)} characters of help, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"
        characters = sorted(set(text))
        self.characters = len(characters)
        number = {character: i for i, character in enumerate(characters)}
        numbers = torch.tensor([number[character] for character in text])
        self.train, self.held_out = numbers[: -len(text) // 20], numbers[-len(text) // 20 :]

    def _cut(self, text: Tensor, starts: Tensor) -> Batch:
        pieces = text[starts.unsqueeze(1) + torch.arange(self.context + 1)]
        return pieces[:, :-1], pieces[:, 1:].flatten()

    def batches(self, quick: bool) -> Iterator[Batch]:
        shuffle = torch.Generator().manual_seed(1)
        for _ in range(self.steps(quick)):
            yield self._cut(self.train, torch.randint(len(self.train) - self.context, (16,), generator=shuffle))

    def steps(self, quick: bool) -> int:
        return 40 if quick else 400

    def test(self) -> Batch:
        return self._cut(self.held_out, torch.arange(0, len(self.held_out) - self.context - 1, self.context))


def train(comparison: Comparison, quick: bool) -> None:
    """Alternate batch by batch, so that a slow moment of the machine affects both."""
    turns = [comparison.torch, comparison.onepass]
    batches = comparison.data.batches(quick)
    # disable=None: a progress bar on a terminal, nothing in a log.
    progress = tqdm(
        batches, desc=comparison.network, total=comparison.data.steps(quick), unit="step", disable=None, leave=False
    )
    for inputs, targets in progress:
        for run in turns:
            run.learn(inputs, targets)
        turns.reverse()
    for run in turns:
        run.test(*comparison.data.test())


def comparisons() -> list[Comparison]:
    """SGD with momentum on a CNN, AdamW with clipping on an MLP and on a character GPT."""
    digits, text = Digits(), HelpText()
    print(text.name)

    def run(make_model: Callable[[], nn.Module], make_step: Callable[[nn.Module], Step], convert: bool = False) -> Run:
        torch.manual_seed(0)
        model = make_model()
        if convert:
            onepass.convert(model)
        return Run(model, make_step(model))

    def gpt() -> nn.Module:
        return CharacterGPT(text.characters, text.context)

    return [
        Comparison("CNN", "SGD, momentum", digits, run(cnn, sgd_torch), run(cnn, sgd_onepass, True), dropout=True),
        Comparison("MLP", "AdamW, clipping", digits, run(mlp, adamw_torch), run(mlp, adamw_onepass)),
        Comparison("GPT", "AdamW, clipping", text, run(gpt, adamw_torch), run(gpt, adamw_onepass, True), dropout=True),
    ]


def table(results: list[Comparison]) -> str:
    titles = ["model", "optimizer", "loss", "", "test accuracy", "", "optimizer ms", "", "ratio", "whole step ms", ""]
    below = ["", "", *["torch", "onepass"] * 3, "", "torch", "onepass"]
    lines = [
        [
            result.network,
            result.optimizer,
            *(f"{smooth(run.losses)[-1]:.6f}" for run in (result.torch, result.onepass)),
            *(f"{run.accuracy:.2%}" for run in (result.torch, result.onepass)),
            *(f"{run.optimizer_ms:.4f}" for run in (result.torch, result.onepass)),
            f"{result.ratio:.1f}x",
            *(f"{run.step_ms:.3f}" for run in (result.torch, result.onepass)),
        ]
        for result in results
    ]
    widths = [5, 15, 10, 10, 13, 8, 12, 8, 6, 13, 8]
    rows = [titles, below, ["-" * width for width in widths], *lines]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def draw(results: list[Comparison], path: Path) -> None:
    """Left: the loss curves on top of each other. Right: the time in the optimizer."""
    torch_colour, onepass_colour = "#e69f00", "#0072b2"  # distinguishable for colour-blind readers
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", width_ratios=(3, 2))

    for result in results:
        steps = range(1, len(result.torch.losses) + 1)
        torch_curve, onepass_curve = smooth(result.torch.losses), smooth(result.onepass.losses)
        left.plot(steps, torch_curve, color=torch_colour, linewidth=5, label="torch.optim")
        left.plot(steps, onepass_curve, color=onepass_colour, linewidth=1.5, label="onepass, on top of it")
        end = (steps[-1], torch_curve[-1])
        left.annotate(result.network, end, (6, 0), textcoords="offset points", va="center", fontweight="bold")
    left.set_yscale("log")
    left.set_xlabel("step")
    left.set_ylabel("training loss (mean of 20 steps)")
    left.set_title("The same losses", loc="left", fontweight="bold")
    left.legend(*(entries[:2] for entries in left.get_legend_handles_labels()), frameon=False)

    for side, label, colour, offset in (
        ("torch", "torch.optim", torch_colour, -0.2),
        ("onepass", "onepass", onepass_colour, 0.2),
    ):
        times = [1e3 * getattr(result, side).optimizer_ms for result in results]
        places = [place + offset for place in range(len(results))]
        bars = right.bar(places, times, width=0.38, color=colour, label=label)
        right.bar_label(bars, fmt="%.0f", padding=2)
    right.set_xticks(range(len(results)), [f"{r.network}: {r.optimizer}\n{r.ratio:.1f}x" for r in results], fontsize=8)
    right.set_ylabel("microseconds per step (median)")
    right.set_title("Time in the optimizer", loc="left", fontweight="bold")
    right.legend(frameon=False)

    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def smooth(losses: list[float], width: int = 20) -> list[float]:
    """The mean of the last ``width`` losses, because a single batch says little."""
    return [statistics.fmean(losses[max(0, end - width) : end]) for end in range(1, len(losses) + 1)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, to show that everything works")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="file of the figure (default demo.png)")
    args = parser.parse_args()

    torch.set_num_threads(1)  # networks this small are no faster on more threads, and the times vary less
    print(f"onepass {onepass.__version__}, torch {torch.__version__}, one thread")
    results = comparisons()
    for comparison in results:
        train(comparison, args.quick)
    print(table(results))
    draw(results, args.out)
    print(f"figure: {args.out}")

    for result in results:
        verdict = "the same" if result.agrees else "NOT the same"
        if result.dropout:
            how = f"on average, the masks differ (relative difference {result.loss_difference:.1%})"
        else:
            how = f"to rounding (largest difference of {len(result.torch.losses)} steps {result.loss_difference:.1e})"
        print(f"{result.network}: losses of torch and onepass are {verdict} {how}")
    return 0 if all(result.agrees and math.isfinite(result.loss_difference) for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
