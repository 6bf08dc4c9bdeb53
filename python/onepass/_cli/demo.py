"""Train small networks with torch and with onepass: the same losses, and their times.

A character GPT and a character MLP learn the text of Python's help; a CNN learns handwritten digits where scikit-learn, which
has them, is installed. Nothing is downloaded. Each is trained twice from the same seed on the same batches: once with torch
on its fastest path, once with onepass. The change is two lines, the second only for networks with norms or dropout:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    optimizer = onepass.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model = onepass.convert(model)

Matrix products and convolutions stay torch's. So the table says what share of a step the rest is, which is all that can be
won, and how much of it is won. If the losses do not agree, the exit code is 1.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__, convert, optim
from .demo_data import Data, HelpText, digits
from .demo_networks import CharacterGPT, character_mlp, cnn
from .output import PictureFile, progress, text_table

MAX_NORM = 1.0
# Two float32 programs that round differently drift apart, because training amplifies the last bit of a weight: here to
# about 1e-6 in the loss, also between torch's own paths. Another seed changes the loss by 1e-1.
LOSS_TOLERANCE = 1e-4
# With dropout the two draw different masks, as two seeds of torch would: the curves agree on average only, to 3 % in the few
# steps of --quick. Twice the learning rate changes the average by 11 %.
MASK_TOLERANCE = 0.05

PRODUCTS = re.compile(r"^aten::(addmm|mm|bmm|baddbmm|_convolution|mkldnn_convolution|convolution_backward)$|^mkldnn_")

Step = Callable[[], object]


def sgd_torch(model: nn.Module) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    return optimizer.step


def sgd_onepass(model: nn.Module) -> Step:
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return optimizer.step


def adamw_torch(model: nn.Module) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def clip_and_step() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()

    return clip_and_step


def adamw_onepass(model: nn.Module) -> Step:
    optimizer = optim.AdamW(model.parameters(), lr=1e-3, max_norm=MAX_NORM)  # clips inside the step
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
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler announces every start and stop
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
        """The largest over all steps; with dropout the relative difference of the means, which masks hardly change."""
        difference = np.subtract(self.torch.losses, self.onepass.losses)
        if self.dropout:
            return float(abs(difference.mean()) / np.mean(self.torch.losses))
        return float(np.abs(difference).max())

    @property
    def agrees(self) -> bool:
        return self.loss_difference <= (MASK_TOLERANCE if self.dropout else LOSS_TOLERANCE)


def train(comparison: Comparison, quick: bool) -> None:
    """Alternate batch by batch, so that a slow moment of the machine affects both."""
    turns = [comparison.torch, comparison.onepass]
    steps = comparison.data.steps(quick)
    for inputs, targets in progress(comparison.data.batches(quick), steps, lambda _: comparison.network):
        for run in turns:
            run.learn(inputs, targets)
        turns.reverse()
    for run in turns:
        run.test(*comparison.data.test())
        run.model.train()
        run.profile(inputs, targets)


def comparisons() -> list[Comparison]:
    """AdamW with clipping on an MLP and a GPT, SGD with momentum on a CNN."""

    def run(make_model: Callable[[], nn.Module], make_step: Callable[[nn.Module], Step], ours: bool = False) -> Run:
        torch.manual_seed(0)
        model = make_model()
        return Run(convert(model) if ours else model, make_step(model))

    text, last = HelpText(context=64, batch=16), HelpText(context=16, batch=64, last_only=True)
    print(text.name)

    def gpt() -> nn.Module:
        return CharacterGPT(text.characters, text.context)

    def mlp() -> nn.Module:
        return character_mlp(last.characters, last.context)

    momentum, clipping = "SGD, momentum", "AdamW, clipping"
    result = [
        Comparison("MLP", clipping, last, run(mlp, adamw_torch), run(mlp, adamw_onepass)),
        Comparison("GPT", clipping, text, run(gpt, adamw_torch), run(gpt, adamw_onepass, True), dropout=True),
    ]
    images = digits()
    if images is None:
        why = "scikit-learn is not installed: the CNN on its handwritten digits is left out (pip install scikit-learn)"
        print(why, file=sys.stderr)
    else:
        result.append(
            Comparison("CNN", momentum, images, run(cnn, sgd_torch), run(cnn, sgd_onepass, True), dropout=True)
        )
    return result


def table(results: list[Comparison]) -> str:
    header = ["model", "optimizer", "loss\ntorch", "onepass", "test accuracy\ntorch", "onepass", "optimizer\nratio"]
    header += ["whole step\ntorch ms", "ratio", "quartiles", "share not\nin matmuls", "ratio of\nthat share"]
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
    notes = [
        "share not in matmuls: of torch's step; what is outside of matrix products and convolutions",
        "ratio of that share: torch's time for it, divided by that of onepass",
    ]
    return "\n".join([text_table(header, lines), *notes])


def smooth(losses: list[float], width: int = 20) -> list[float]:
    """The mean of the last ``width`` losses, because a single batch says little."""
    return [statistics.fmean(losses[max(0, end - width) : end]) for end in range(1, len(losses) + 1)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a few steps, to show that everything works")
    parser.add_argument("--plot", type=PictureFile, metavar="FILE", help="save a picture (matplotlib)")


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)  # the times vary less, too
    print(f"onepass {__version__}, torch {torch.__version__}, one thread: networks this small are no faster on more")
    results = comparisons()
    for comparison in results:
        train(comparison, args.quick)
    print(table(results))
    for result in results:
        verdict = "the same" if result.agrees else "NOT the same"
        steps, difference = len(result.torch.losses), result.loss_difference
        if result.dropout:
            how = f"on average: the masks differ, and the means of {steps} steps by {difference:.1%}"
        else:
            how = f"to rounding: in {steps} steps they differ by {difference:.1e} at most"
        print(f"{result.network}: losses of torch and onepass are {verdict} {how}")
    if args.plot:
        from .demo_plot import picture

        args.plot.write(picture(results, args.plot.format))
    return 0 if all(result.agrees and math.isfinite(result.loss_difference) for result in results) else 1
