"""A convolutional network reads handwritten digits: SGD with momentum and a cosine schedule, BatchNorm converted.

Prints what convert() did, the time of a step, and the share of digits read right, beside torch's. The picture shows the
twelve digits that it is least certain of.

    python examples/digits_cnn.py [--quick] [--out digits_cnn.png]
"""

from __future__ import annotations

import sys
import time

import onepass
import torch
from helpers import options, progress, same_losses, save
from onepass._cli.demo_data import Digits
from torch import Tensor, nn


def make_model() -> nn.Module:
    def block(inp: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(inp, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.Tanh()]

    # tanh, not ReLU: at ReLU's kink a rounding error becomes a visible jump, and the losses of any two programs part.
    torch.manual_seed(0)
    layers = [*block(1, 16), *block(16, 16), nn.AvgPool2d(2), *block(16, 32), nn.AvgPool2d(2)]
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.Flatten(), nn.Linear(32 * 2 * 2, 10))


def train(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, digits: Digits, quick: bool) -> list[float]:
    steps = digits.steps(quick)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    begin = time.perf_counter()
    for inputs, targets in progress(digits.batches(quick), name, steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    ms = 1e3 * (time.perf_counter() - begin) / steps
    share = (predict(model, digits) == digits.test_labels).double().mean().item()
    print(
        f"{name:<8} loss {losses[0]:.4f} -> {losses[-1]:.4f}, {share:.1%} of the test read right, {ms:.2f} ms per step"
    )
    return losses


@torch.no_grad()
def predict(model: nn.Module, digits: Digits) -> Tensor:
    model.eval()
    read: Tensor = model(digits.test_images).argmax(1)
    return read


def main() -> int:
    args = options(__doc__, picture=True)
    digits = Digits()
    model = make_model()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    theirs = train("torch", model, optimizer, digits, args.quick)

    model = make_model()
    print(onepass.convert(model, report=True))
    optimizer = onepass.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    ours = train("onepass", model, optimizer, digits, args.quick)

    same = same_losses(ours, theirs, 1e-3)

    from matplotlib.figure import Figure

    with torch.no_grad():
        certainty, read = model(digits.test_images).softmax(1).max(1)
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    for axes, i in zip(figure.subplots(2, 6).flat, certainty.argsort()[:12].tolist(), strict=True):
        axes.imshow(digits.test_images[i].view(8, 8), cmap="Greys")
        right = read[i] == digits.test_labels[i]
        axes.set_title(f"{digits.test_labels[i]} read as {read[i]}", fontsize=9, color="black" if right else "red")
    for axes in figure.axes:
        axes.axis("off")
    save(figure, args.out)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
