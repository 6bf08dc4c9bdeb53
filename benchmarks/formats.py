"""What `state_dtype` costs and saves: bytes of states, time of an AdamW step on 25M elements, and what training loses.

The same networks are trained on scikit-learn's digits with the same seeds and batches under each format, and under the
states of full precision; the spread over seeds says what a difference means.

    python benchmarks/formats.py            # about two minutes
    python benchmarks/formats.py --quick

Saves <out>/formats-<date>-<machine>.json; report.py reads it.
"""

from __future__ import annotations

import argparse
import functools
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
from torch import Tensor
from torch.nn import functional as F

FORMATS: dict[str, Any] = {"full": None, "bfloat16": torch.bfloat16, "8bit": "8bit"}
PEER = "torch fused"


def optimizer_on(elements: int, dtype: torch.dtype, make: Callable[[list[Tensor]], Any]) -> Any:
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(elements).to(dtype))
    param.grad = torch.randn(elements).to(dtype)
    optimizer = make([param])
    optimizer.step()
    return optimizer


def bytes_of_states(optimizer: Any, elements: int) -> float:
    states: dict[str, Tensor] = optimizer.state_dict()["state"][0]
    return sum(s.numel() * s.element_size() for s in states.values() if s.dim()) / elements


def step_times(elements: int, dtype: torch.dtype, seconds: float) -> list[Json]:
    """One row per format: milliseconds, the ratio of full states' time to it, and bytes of states per parameter."""
    optimizers = {
        name: optimizer_on(elements, dtype, functools.partial(onepass.optim.AdamW, state_dtype=format_))
        for name, format_ in FORMATS.items()
    }
    optimizers[PEER] = optimizer_on(elements, dtype, lambda params: torch.optim.AdamW(params, fused=True))
    variants = [Variant(name, optimizer.step) for name, optimizer in optimizers.items()]
    samples = harness.measure(variants, torch.device("cpu"), seconds=seconds)
    rows = []
    for name, optimizer in optimizers.items():
        ratio = samples[name].times(samples["full"])
        rows.append(
            {
                "kind": "step",
                "name": f"{str(dtype).removeprefix('torch.')} parameters, {name}",
                "elements": elements,
                "bytes": bytes_of_states(optimizer, elements),
                "median_ms": samples[name].summary()["median_ms"],
                "times_of_full": ratio.quartiles,
                "busy": [] if ratio.quiet else [name],
            }
        )
    return rows


def networks() -> dict[str, Callable[[], torch.nn.Module]]:
    def cnn() -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Unflatten(1, (1, 8, 8)),
            torch.nn.Conv2d(1, 16, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(16, 32, 3, padding=1, stride=2),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(512, 10),
        )

    def mlp() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))

    return {"MLP": mlp, "CNN": cnn}


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


def train(
    network: Callable[[], torch.nn.Module], make: Callable[..., Any], seed: int, steps: int
) -> tuple[float, float]:
    """The loss on the training images and the error on the others, after training."""
    images, labels = digits()
    torch.manual_seed(seed)
    order = torch.randperm(len(images))
    training, others = order[:1400], order[1400:]
    model = network()
    optimizer = make(model.parameters())
    for _ in range(steps):
        batch = training[torch.randint(len(training), (64,))]
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        loss = F.cross_entropy(model(images[training]), labels[training])
        wrong = (model(images[others]).argmax(1) != labels[others]).float().mean()
    return float(loss), float(wrong)


def losses(steps: int, seeds: int) -> list[Json]:
    """One row per network, rule and format: mean and deviation over the seeds."""
    rules: dict[str, Callable[..., Any]] = {
        "AdamW": lambda params, f: onepass.optim.AdamW(params, lr=1e-3, state_dtype=f),
        "SGD": lambda params, f: onepass.optim.SGD(params, lr=0.05, momentum=0.9, state_dtype=f),
        "RMSprop": lambda params, f: onepass.optim.RMSprop(params, lr=1e-3, state_dtype=f),
    }
    rows = []
    for network, make_network in networks().items():
        for rule, make in rules.items():
            for name, format_ in FORMATS.items():
                runs = [train(make_network, lambda p, f=format_, m=make: m(p, f), seed, steps) for seed in range(seeds)]
                loss, error = zip(*runs, strict=True)
                rows.append(
                    {
                        "kind": "loss",
                        "name": f"{network}, {rule}, {name}",
                        "loss": [statistics.mean(loss), statistics.stdev(loss)],
                        "error": [statistics.mean(error), statistics.stdev(error)],
                        "busy": [],
                    }
                )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and few, to show that it works")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="folder of the results")
    args = parser.parse_args()
    elements, seconds, steps, seeds = (10_000, 0.1, 5, 2) if args.quick else (25_000_000, 8.0, 600, 5)
    result: Json = {"benchmark": "formats", "environment": machine.environment(torch.device("cpu")), "rows": []}
    for dtype in (torch.float32, torch.bfloat16):
        result["rows"] += step_times(elements, dtype, seconds)
    result["rows"] += losses(steps, seeds)
    path = harness.save(result, args.out, "formats-quick" if args.quick else "formats")
    print(report_formats.markdown(result))
    print(f"saved {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
