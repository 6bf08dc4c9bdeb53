"""What `state_dtype`, `master_bits` and `stochastic_rounding` cost and save: bytes, time of a step, and what training loses.

Times: AdamW on one tensor. Losses: networks trained under each option with the same seeds and batches; the spread over the
seeds says what a difference means.

    python benchmarks/formats.py             # about ten minutes
    python benchmarks/formats.py --quick
    python benchmarks/formats.py --part times

Saves <out>/formats-<date>-<machine>.json; report.py reads it.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import machine
import onepass
import report_formats
import torch
from harness import Json, Variant
from onepass._cli.demo_data import HelpText
from onepass._cli.demo_networks import CharacterGPT
from optimizers import FORMATS
from torch import Tensor, nn
from torch.nn import functional as F

Options = dict[str, Any]

# Options under their names, for parameters of a dtype; the first is what the others are compared with.
BFLOAT16: dict[str, Options] = {name or "float32 states": options for name, options in FORMATS.items()}
FLOAT32 = {name: BFLOAT16[name] for name in ("float32 states", "bfloat16 states", "8-bit states")}
BY_DTYPE = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


# ---- time and bytes


def step_times(elements: int, dtype: torch.dtype, seconds: float) -> list[Json]:
    """One row per option: milliseconds, the time over that of float32 states, and bytes of states per parameter."""

    def prepared(make: Callable[[list[Tensor]], Any]) -> Any:
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(elements).to(dtype))
        param.grad = torch.randn(elements).to(dtype)
        optimizer = make([param])
        optimizer.step()
        return optimizer

    optimizers = {
        name: prepared(functools.partial(onepass.optim.AdamW, **options)) for name, options in BY_DTYPE[dtype].items()
    }
    optimizers["torch fused"] = prepared(lambda params: torch.optim.AdamW(params, fused=True))
    variants = [Variant(name, optimizer.step) for name, optimizer in optimizers.items()]
    samples = harness.measure(variants, torch.device("cpu"), seconds=seconds)
    rows = []
    for name, optimizer in optimizers.items():
        ratio = samples[name].times(samples["float32 states"])
        states: dict[str, Tensor] = optimizer.state_dict()["state"][0]
        rows.append(
            {
                "kind": "step",
                "dtype": str(dtype).removeprefix("torch."),
                "name": name,
                "elements": elements,
                "bytes": sum(s.numel() * s.element_size() for s in states.values() if s.dim()) / elements,
                "median_ms": samples[name].summary()["median_ms"],
                "times_of_full": ratio.quartiles,
                "busy": [] if ratio.quiet else [name],
            }
        )
    return rows


# ---- losses


class Digits:
    """8 x 8 images of digits; 397 of the 1797 are held out."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]

        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        self.images, self.labels = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]

    def batch(self) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(1400, (64,))
        return self.images[chosen], self.labels[chosen]

    def held_out(self) -> tuple[Tensor, Tensor]:
        return self.images[1400:], self.labels[1400:]


class Text:
    """The text of Python's help, character by character; `windows`: how much of what is held out counts, None for all."""

    def __init__(self, windows: int | None) -> None:
        self.help, self.windows = HelpText(), windows

    def batch(self) -> tuple[Tensor, Tensor]:
        text, context = self.help.train, self.help.context
        starts = torch.randint(len(text) - context, (16, 1))
        windows = text[starts + torch.arange(context + 1)]
        return windows[:, :-1], windows[:, 1:].flatten()

    def held_out(self) -> tuple[Tensor, Tensor]:
        inputs, targets = self.help.test()
        inputs = inputs[: self.windows]
        return inputs, targets[: inputs.numel()]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


Train = Callable[[torch.dtype, Options, int], float]


def trainer(data: Any, network: Callable[[], nn.Module], optimizer: Callable[..., Any], steps: int) -> Train:
    """(dtype of the parameters, options, seed) -> the loss on held-out data after training.

    Activations are float32 in any case: what is compared is how parameters and states are kept.
    """

    def train(dtype: torch.dtype, options: Options, seed: int) -> float:
        torch.manual_seed(seed)
        model = network()
        copies = list(model.parameters())
        params = [nn.Parameter(copy.detach().to(dtype)) for copy in copies]
        ours = optimizer(params, **options)
        schedule = torch.optim.lr_scheduler.LinearLR(ours, 1.0, 0.05, total_iters=steps)

        def loss_on(inputs: Tensor, targets: Tensor) -> Tensor:
            with torch.no_grad():
                for copy, param in zip(copies, params, strict=True):
                    copy.copy_(param)
            model.zero_grad()
            return F.cross_entropy(model(inputs).flatten(0, -2), targets)

        for _ in range(steps):
            loss_on(*data.batch()).backward()  # type: ignore[no-untyped-call]
            for param, copy in zip(params, copies, strict=True):
                param.grad = None if copy.grad is None else copy.grad.to(dtype)
            ours.step()
            schedule.step()
        with torch.no_grad():
            return float(loss_on(*data.held_out()))

    return train


def tasks(quick: bool) -> dict[str, Train]:
    steps, text_steps = (2, 1) if quick else (800, 500)

    def adamw(params: Any, **options: Any) -> Any:
        return onepass.optim.AdamW(params, lr=1e-3, **options)

    def sgd(params: Any, **options: Any) -> Any:
        return onepass.optim.SGD(params, lr=0.05, momentum=0.9, **options)

    digits, text = Digits(), Text(8 if quick else None)
    return {
        "MLP on digits, AdamW": trainer(digits, mlp, adamw, steps),
        "CNN on digits, SGD with momentum": trainer(digits, cnn, sgd, steps),
        "character GPT, AdamW": trainer(
            text, lambda: CharacterGPT(text.help.characters, text.help.context, dropout=0.0), adamw, text_steps
        ),
    }


def losses(quick: bool, seeds: int) -> list[Json]:
    """One row per task, dtype of the parameters and option: mean and standard deviation over the seeds."""
    torch.set_num_threads(1)  # the networks are small
    rows: list[Json] = []
    for task, train in tasks(quick).items():
        for dtype, named in BY_DTYPE.items():
            for name, options in named.items():
                runs = [train(dtype, options, seed) for seed in range(seeds)]
                rows.append(
                    {
                        "kind": "loss",
                        "task": task,
                        "dtype": str(dtype).removeprefix("torch."),
                        "name": name,
                        "loss": [statistics.mean(runs), statistics.stdev(runs)],
                        "busy": [],
                    }
                )
                print(f"{task}, {rows[-1]['dtype']}, {name}: {rows[-1]['loss'][0]:.4f}", file=sys.stderr)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and few, to show that it works")
    parser.add_argument("--part", choices=("all", "times", "losses"), default="all")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="folder of the results")
    args = parser.parse_args()
    elements, seconds, seeds = (10_000, 0.1, 2) if args.quick else (25_000_000, 10.0, 5)
    result: Json = {"benchmark": "formats", "environment": machine.environment(torch.device("cpu")), "rows": []}
    if args.part != "losses":
        for dtype in BY_DTYPE:
            result["rows"] += step_times(elements, dtype, seconds)
    if args.part != "times":
        result["rows"] += losses(args.quick, seeds)
    name = "formats-quick" if args.quick else "formats"
    before = harness.path_of(result, args.out, name)
    if args.part != "all" and before.exists():  # the other part stays as it was saved on this day and machine
        kind = result["rows"][0]["kind"]
        result["rows"] += [row for row in json.loads(before.read_text())["rows"] if row["kind"] != kind]
    path = harness.save(result, args.out, name)
    print(report_formats.markdown(result))
    print(f"saved {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
