"""A character GPT learns the text of Python's help: AdamW, gradient clipping, warm-up and decay, converted layers.

The network is trained twice from the same weights on the same batches, with torch and with onepass. Then it writes.

    python examples/char_gpt.py [--quick] [--out char_gpt.png]
"""

from __future__ import annotations

import sys
import time

import onepass
import torch
from helpers import BLUE, ORANGE, options, progress, same_losses, save
from onepass._cli.demo_data import HelpText
from onepass._cli.demo_networks import CharacterGPT
from torch import nn

MAX_NORM = 1.0


def make_model(text: HelpText) -> CharacterGPT:
    torch.manual_seed(0)
    return CharacterGPT(text.characters, text.context, dropout=0.0)  # masks would differ, and with them the losses


def train(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, text: HelpText, quick: bool) -> list[float]:
    steps = text.steps(quick)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps + 1)
    losses = []
    begin = time.perf_counter()
    for inputs, targets in progress(text.batches(quick), name, steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        if name == "torch":
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    ms = 1e3 * (time.perf_counter() - begin) / steps
    print(f"{name:<8} loss {losses[0]:.4f} -> {losses[-1]:.4f}, {ms:.2f} ms per step")
    return losses


@torch.no_grad()
def write(model: nn.Module, text: HelpText, length: int) -> str:
    """Draw one character after another from the network's predictions."""
    model.eval()
    torch.manual_seed(1)
    numbers = text.held_out[: text.context].clone()
    for _ in range(length):
        logits = model(numbers[-text.context :].unsqueeze(0))[-1]
        numbers = torch.cat((numbers, torch.multinomial((logits / 0.8).softmax(0), 1)))
    return "".join(text.alphabet[number] for number in numbers[text.context :])


def main() -> int:
    args = options(__doc__, picture=True)
    text = HelpText()
    model = make_model(text)
    theirs = train("torch", model, torch.optim.AdamW(model.parameters(), fused=True), text, args.quick)

    model = onepass.convert(make_model(text))
    optimizer = onepass.optim.AdamW(model.parameters(), max_norm=MAX_NORM)  # clips inside the step
    ours = train("onepass", model, optimizer, text, args.quick)

    same = same_losses(ours, theirs, 1e-3)
    print(f"--- it writes:\n{write(model, text, 60 if args.quick else 400)}\n---")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(theirs, color=ORANGE, linewidth=4, label="torch")
    axes.plot(ours, color=BLUE, linewidth=1, label="onepass, on top of it")
    axes.set(xlabel="step", ylabel="loss (nats per character)", title="A character GPT: the same losses")
    axes.legend(frameon=False)
    save(figure, args.out)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
