"""onepass and torch on real data: the same losses, less time.

Two networks learn to read handwritten digits (from scikit-learn); a third, a character GPT, learns the text of Python's
help. Nothing is downloaded. Each is trained twice from the same seed on the same batches: once with torch on its fastest
path, once with onepass. The change is two lines, the second only for networks with norms or dropout:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    optimizer = onepass.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model = onepass.convert(model)

Matrix products and convolutions stay torch's. So the table says what share of a step the rest is, which is all that can be
won, and how much of it is won. Prints the table, checks that the losses agree, and plots both in one figure.

    python examples/demo.py [--quick] [--out demo.png]
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import onepass
import torch
from demo_data import Data, Digits, HelpText
from demo_networks import CharacterGPT, cnn, mlp
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

MAX_NORM = 1.0
# Two float32 programs that round differently drift apart, because training amplifies the last bit of a weight: here to
# about 1e-6 in the loss, also between torch's own paths. Another seed changes the loss by 1e-1.
LOSS_TOLERANCE = 1e-4
# With dropout the two draw different masks, as two seeds of torch would: the curves agree on average only.
MASK_TOLERANCE = 0.1

PRODUCTS = re.compile(r"^aten::(addmm|mm|bmm|baddbmm|_convolution|mkldnn_convolution|convolution_backward)$|^mkldnn_")

Step = Callable[[], object]


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
    products: float = 0.0  # share of a step that is spent in matrix products and convolutions

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

    def profile(self, inputs: Tensor, targets: Tensor) -> None:
        """Finds ``products``, the median of some further steps, which do not count otherwise."""
        twin = Run(self.model, self.step)
        shares = []
        for _ in range(5):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                twin.learn(inputs, targets)
            times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
            shares.append(sum(t for key, t in times.items() if PRODUCTS.search(key)) / sum(times.values()))
        self.products = statistics.median(shares)

    # The median over the steps, because other processes on the machine distort the mean.
    @property
    def optimizer_ms(self) -> float:
        return 1e3 * statistics.median(self.optimizer_seconds)

    @property
    def step_ms(self) -> float:
        return 1e3 * statistics.median(self.step_seconds)

    @property
    def rest_ms(self) -> float:
        """Outside of matrix products and convolutions."""
        return self.step_ms * (1 - self.products)


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
    def optimizer_ratio(self) -> float:
        return self.torch.optimizer_ms / self.onepass.optimizer_ms

    @property
    def rest_ratio(self) -> float:
        return self.torch.rest_ms / self.onepass.rest_ms

    @property
    def step_quartiles(self) -> list[float]:
        """How many times as long as onepass torch takes for the same batch: quartiles over the batches."""
        ratios = [t / ours for t, ours in zip(self.torch.step_seconds, self.onepass.step_seconds, strict=True)]
        return statistics.quantiles(ratios, n=4)

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
        run.model.train()
        run.profile(inputs, targets)


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
    titles = ["", "", "loss", "", "test accuracy", "", "optimizer", "whole step", "", "", "outside of", "there"]
    below = [
        "model",
        "optimizer",
        *["torch", "onepass"] * 2,
        "ratio",
        "torch ms",
        "ratio",
        "quartiles",
        "products",
        "ratio",
    ]
    lines = []
    for result in results:
        runs = (result.torch, result.onepass)
        low, median, high = result.step_quartiles
        lines.append(
            [
                result.network,
                result.optimizer,
                *(f"{smooth(run.losses)[-1]:.6f}" for run in runs),
                *(f"{run.accuracy:.2%}" for run in runs),
                f"{result.optimizer_ratio:.1f}x",
                f"{result.torch.step_ms:.2f}",
                f"{median:.2f}x",
                f"{low:.2f} to {high:.2f}",
                f"{1 - result.torch.products:.0%}",
                f"{result.rest_ratio:.2f}x",
            ]
        )
    rows = [titles, below, *lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(2, ["-" * width for width in widths])
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(
        [*text, "outside of products: the share of torch's step that is not in matrix products and convolutions"]
    )


def draw(results: list[Comparison], path: Path) -> None:
    """Left: the loss curves on top of each other. Right: where the time of a step goes."""
    torch_colour, onepass_colour, grey = "#e69f00", "#0072b2", "#bbbbbb"  # distinguishable for colour-blind readers
    plt.rcParams["font.size"] = 11
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", width_ratios=(1, 1))

    for result in results:
        steps = range(1, len(result.torch.losses) + 1)
        torch_curve, onepass_curve = smooth(result.torch.losses), smooth(result.onepass.losses)
        left.plot(steps, torch_curve, color=torch_colour, linewidth=5, label="torch")
        left.plot(steps, onepass_curve, color=onepass_colour, linewidth=1.5, label="onepass, on top of it")
        end = (steps[-1], torch_curve[-1])
        left.annotate(result.network, end, (6, 0), textcoords="offset points", va="center", fontweight="bold")
    left.set_yscale("log")
    left.set_xlabel("step")
    left.set_ylabel("training loss (mean of 20 steps)")
    left.set_title("The same losses", loc="left", fontweight="bold")
    left.legend(*(entries[:2] for entries in left.get_legend_handles_labels()), frameon=False)

    ticks = []
    for i, result in enumerate(results):
        for run, label, colour, place in (
            (result.torch, "torch", torch_colour, 2.6 * i),
            (result.onepass, "onepass", onepass_colour, 2.6 * i + 1),
        ):
            products = 100 * (run.step_ms - run.rest_ms) / result.torch.step_ms
            rest = 100 * run.rest_ms / result.torch.step_ms
            right.barh(place, products, color=grey, height=0.9)
            right.barh(place, rest, left=products, color=colour, height=0.9)
            ratio = f"  {result.step_quartiles[1]:.2f}x as fast" if run is result.onepass else ""
            right.text(products + rest + 1, place, f"{run.step_ms:.2f} ms{ratio}", va="center", size=10)
            ticks.append((place, f"{result.network}, {label}"))
    right.set_yticks(*zip(*ticks, strict=True))
    right.invert_yaxis()
    right.set_xlim(0, 50 + max(100, *(100 * r.onepass.step_ms / r.torch.step_ms for r in results)))
    right.set_xticks([0, 50, 100], ["0 %", "50 %", "100 %"])
    right.set_xlabel("of torch's step; grey: matrix products and convolutions")
    right.tick_params(axis="y", length=0)
    right.set_title("Less time for everything else", loc="left", fontweight="bold")

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
