"""What `step_in_backward` saves: peak memory and time of backward and step, on a language model as large as GPT-2 small.

    python benchmarks/in_backward.py            # about two minutes, 8 GB
    python benchmarks/in_backward.py --quick

Prints the peak of weights, gradients, states and activations as torch allocates them, and the time of a step.
"""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

import harness
import machine
import onepass
import torch
from harness import Variant
from phrases import describe
from torch import Tensor
from torch.nn import functional as F


class LanguageModel(torch.nn.Module):
    """A decoder whose last layer shares the weights of its embedding."""

    def __init__(self, words: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(words, width)
        layer = torch.nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = torch.nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        hidden = self.blocks(self.embedding(tokens), mask, is_causal=True)
        return F.linear(hidden, self.embedding.weight)


def trainer(size: tuple[int, int, int], tokens: Tensor, optimizer_of: Any, in_backward: bool) -> Any:
    """A function that trains one step, and the bytes of weights and states that lie there before it."""
    torch.manual_seed(0)
    model = LanguageModel(*size)
    optimizer = optimizer_of(model.parameters())
    if in_backward:
        onepass.optim.step_in_backward(optimizer)

    def step() -> None:
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        if not in_backward:
            optimizer.step()
            optimizer.zero_grad()

    step()  # makes the states
    states = [s for states in optimizer.state.values() for s in states.values()]
    kept = sum(t.numel() * t.element_size() for t in (*model.parameters(), *states))
    return step, kept


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small, to show that it works")
    args = parser.parse_args()
    size, seconds = ((500, 64, 2), 0.5) if args.quick else ((50257, 768, 12), 30.0)
    tokens = torch.randint(size[0], (1, 64))
    adamw = onepass.optim.AdamW
    ways = {
        "torch fused": (functools.partial(torch.optim.AdamW, fused=True), False),
        "onepass": (adamw, False),
        "in backward": (adamw, True),
        "in backward, 8bit": (functools.partial(adamw, state_dtype="8bit"), True),
    }
    print(describe({"environment": machine.environment(torch.device("cpu"))}))
    peaks: dict[str, float] = {}
    variants = []
    for name, (optimizer_of, in_backward) in ways.items():
        step, kept = trainer(size, tokens, optimizer_of, in_backward)
        peaks[name] = kept + harness.peak_memory(step, torch.device("cpu"))
        variants.append(Variant(name, step))
    samples = harness.measure(variants, torch.device("cpu"), seconds=seconds)
    print(f"{'':20}{'peak MB':>10}{'of torch':>10}{'ms':>10}{'of torch (quartiles)':>24}")
    for name, sample in samples.items():
        low, middle, high = sample.times(samples["torch fused"]).quartiles
        print(
            f"{name:20}{peaks[name] * 1e-6:10.0f}{peaks[name] / peaks['torch fused']:10.2f}"
            f"{sample.summary()['median_ms']:10.1f}{middle:10.2f} ({low:.2f} to {high:.2f})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
