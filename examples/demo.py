"""onepass beside torch.optim on real data: the same losses, less time in the optimizer.

Two networks learn to read handwritten digits (scikit-learn's, nothing is downloaded). Each is trained twice from the
same seed on the same batches: once by torch.optim on its fastest path, once by onepass. The swap is the import:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    optimizer = onepass.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

Prints a table, checks that the losses agree, and draws both into one picture.

    python examples/demo.py [--epochs 30] [--out demo.png]
"""

from __future__ import annotations

import argparse
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
import sklearn.datasets  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

BATCH = 64
MAX_NORM = 1.0
# Two float32 programs that round differently drift apart as training amplifies the last bit of a weight: here to about
# 1e-6 in the loss, between torch's own paths as well. Another seed changes it by 1e-1.
LOSS_TOLERANCE = 1e-4

Step = Callable[[], object]


# tanh and not ReLU: it has no kink. With ReLU a unit that is +1e-8 in one run and -1e-8 in the other is a visible jump,
# and the curves of any two optimizers that round differently part after some hundred steps, torch's own included.
def cnn() -> nn.Module:
    def block(inp: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(inp, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.Tanh()]

    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(*block(1, 16), *block(16, 16), nn.AvgPool2d(2)),
        *(*block(16, 32), *block(32, 32), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 2 * 2, 10)),
    )


def mlp() -> nn.Module:
    hidden = [layer for _ in range(4) for layer in (nn.Linear(128, 128), nn.Tanh())]
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), *hidden, nn.Linear(128, 10))


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
    step_seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    def learn(self, images: Tensor, labels: Tensor) -> None:
        self.model.zero_grad()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        start = time.perf_counter()
        self.step()
        self.step_seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    @torch.no_grad()
    def test(self, images: Tensor, labels: Tensor) -> None:
        self.model.eval()
        self.accuracy = (self.model(images).argmax(1) == labels).double().mean().item()

    @property
    def milliseconds(self) -> float:
        """In the optimizer, per step. The median: a busy neighbour on the machine shows in the mean."""
        return 1e3 * statistics.median(self.step_seconds)


@dataclass
class Contest:
    """The same network, the same batches, the two libraries."""

    network: str
    optimizer: str
    torch: Run
    onepass: Run

    @property
    def ratio(self) -> float:
        return self.torch.milliseconds / self.onepass.milliseconds

    @property
    def loss_difference(self) -> float:
        return float(np.abs(np.subtract(self.torch.losses, self.onepass.losses)).max())


@dataclass
class Digits:
    """8 x 8 images of handwritten digits, a fifth of them kept for the test."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls) -> Digits:
        pixels, digits = sklearn.datasets.load_digits(return_X_y=True)
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
        images, labels = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(digits)[order]
        test = len(labels) // 5
        return cls(images[test:], labels[test:], images[:test], labels[:test])


def train(contest: Contest, digits: Digits, epochs: int) -> None:
    """Batch by batch in turn, so that what slows one slows the other."""
    shuffle = torch.Generator().manual_seed(1)
    batches = len(digits.train_labels) // BATCH
    turns = [contest.torch, contest.onepass]
    # disable=None: a bar on a terminal, nothing in a log.
    for _ in tqdm(range(epochs), desc=contest.network, unit="epoch", disable=None, leave=False):
        for batch in torch.randperm(len(digits.train_labels), generator=shuffle).tensor_split(batches):
            images, labels = digits.train_images[batch], digits.train_labels[batch]
            for run in turns:
                run.learn(images, labels)
            turns.reverse()
    for run in turns:
        run.test(digits.test_images, digits.test_labels)


def contests() -> list[Contest]:
    """SGD with momentum on a CNN, AdamW with clipping on an MLP."""

    def run(make_model: Callable[[], nn.Module], make_step: Callable[[nn.Module], Step]) -> Run:
        torch.manual_seed(0)
        model = make_model()
        return Run(model, make_step(model))

    return [
        Contest("CNN", "SGD, momentum", torch=run(cnn, sgd_torch), onepass=run(cnn, sgd_onepass)),
        Contest("MLP", "AdamW, clipping", torch=run(mlp, adamw_torch), onepass=run(mlp, adamw_onepass)),
    ]


def table(results: list[Contest]) -> str:
    titles = ["model", "optimizer", "final loss", "", "test accuracy", "", "optimizer ms/step", "", "ratio"]
    below = ["", "", *["torch", "onepass"] * 3, "torch/onepass"]
    lines = [
        [
            result.network,
            result.optimizer,
            *(f"{run.losses[-1]:.6f}" for run in (result.torch, result.onepass)),
            *(f"{run.accuracy:.2%}" for run in (result.torch, result.onepass)),
            *(f"{run.milliseconds:.4f}" for run in (result.torch, result.onepass)),
            f"{result.ratio:.1f}x",
        ]
        for result in results
    ]
    widths = [5, 15, 12, 12, 13, 10, 17, 10, 13]
    rows = [titles, below, ["-" * width for width in widths], *lines]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def draw(results: list[Contest], path: Path) -> None:
    """Left, the loss curves on top of each other; right, the time in the optimizer."""
    torch_colour, onepass_colour = "#e69f00", "#0072b2"  # told apart by colour-blind readers as well
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
        times = [1e3 * getattr(result, side).milliseconds for result in results]
        places = [place + offset for place in range(len(results))]
        bars = right.bar(places, times, width=0.38, color=colour, label=label)
        right.bar_label(bars, fmt="%.0f", padding=2)
    right.set_xticks(
        range(len(results)), [f"{r.network}: {r.optimizer}\ntorch / onepass = {r.ratio:.1f}" for r in results]
    )
    right.set_ylabel("microseconds per step (median)")
    right.set_title("Time in the optimizer", loc="left", fontweight="bold")
    right.legend(frameon=False)

    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def smooth(losses: list[float], width: int = 20) -> list[float]:
    """The mean of the last ``width`` losses: a single batch says little."""
    return [statistics.fmean(losses[max(0, end - width) : end]) for end in range(1, len(losses) + 1)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training images (default 40)")
    parser.add_argument("--quick", action="store_true", help="three epochs: shows that everything works")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture (default demo.png)")
    args = parser.parse_args()

    torch.set_num_threads(1)  # networks this small are no faster on more, and the times are calmer
    print(f"onepass {onepass.__version__}, torch {torch.__version__}, one thread")
    digits, results = Digits.load(), contests()
    for contest in results:
        train(contest, digits, 3 if args.quick else args.epochs)
    print(table(results))
    draw(results, args.out)
    print(f"picture: {args.out}")

    difference = max(result.loss_difference for result in results)
    agree = difference <= LOSS_TOLERANCE
    verdict = "the same to rounding" if agree else f"NOT the same, a difference above {LOSS_TOLERANCE:g}"
    steps = len(results[0].torch.losses)
    print(f"losses of torch and onepass: {verdict} (largest difference in {steps} steps {difference:.1e})")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
