"""Peak memory and time of a training step under the options that save bytes, on a language model as large as GPT-2 small.

    python benchmarks/memory.py            # about five minutes, 12 GB
    python benchmarks/memory.py --quick

The peak is that of weights, gradients, states and activations as torch allocates them. Saves
<out>/memory-<date>-<machine>.json; report.py reads it.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import harness
import machine
import onepass
import report_memory
import torch
from harness import Json, Variant
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


class Way(NamedTuple):
    """How the model is trained. bfloat16 is timed only on request: processors without its instructions take seconds a step."""

    optimizer: Callable[..., Any]
    dtype: torch.dtype = torch.float32
    in_backward: bool = False


adamw = onepass.optim.AdamW
PEER = "torch fused"
WAYS = {
    PEER: Way(functools.partial(torch.optim.AdamW, fused=True)),
    "onepass": Way(adamw),
    "8-bit states": Way(functools.partial(adamw, state_dtype="8bit")),
    "updates inside backward": Way(adamw, in_backward=True),
    "8-bit states, inside backward": Way(functools.partial(adamw, state_dtype="8bit"), in_backward=True),
    "bfloat16 weights, 32-bit master, 8-bit states": Way(
        functools.partial(adamw, state_dtype="8bit", master_bits=32), torch.bfloat16
    ),
    "the same, inside backward": Way(
        functools.partial(adamw, state_dtype="8bit", master_bits=32), torch.bfloat16, in_backward=True
    ),
}


def trainer(size: tuple[int, int, int], tokens: Tensor, way: Way) -> tuple[Callable[[], None], int]:
    """A function that trains one step, and the bytes of weights and states that lie there before it."""
    torch.manual_seed(0)
    model = LanguageModel(*size).to(way.dtype)
    optimizer = way.optimizer(model.parameters())
    if way.in_backward:
        onepass.optim.step_in_backward(optimizer)

    def step() -> None:
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        if not way.in_backward:
            optimizer.step()
            optimizer.zero_grad()

    step()  # makes the states
    states = [s for states in optimizer.state.values() for s in states.values()]
    kept = sum(t.numel() * t.element_size() for t in (*model.parameters(), *states))
    return step, kept


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small, to show that it works")
    parser.add_argument("--time-bfloat16", action="store_true", help="time the steps of bfloat16 models as well")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="folder of the results")
    args = parser.parse_args()
    size, seconds = ((500, 64, 2), 0.5) if args.quick else ((50257, 768, 12), 30.0)
    tokens = torch.randint(size[0], (1, 64))
    rows: list[Json] = []
    variants = []
    for name, way in WAYS.items():
        step, kept = trainer(size, tokens, way)
        rows.append({"name": name, "peak_bytes": kept + harness.peak_memory(step, torch.device("cpu")), "busy": []})
        if way.dtype == torch.float32 or args.time_bfloat16:
            variants.append(Variant(name, step))
    samples = harness.measure(variants, torch.device("cpu"), seconds=seconds)
    for row in rows:
        if row["name"] in samples:
            ratio = samples[row["name"]].times(samples[PEER])
            row |= {"times_of_torch": ratio.quartiles, "busy": [] if ratio.quiet else [row["name"]]}
    result = {"benchmark": "memory", "environment": machine.environment(torch.device("cpu")), "rows": rows}
    path = harness.save(result, args.out, "memory-quick" if args.quick else "memory")
    print(report_memory.markdown(result))
    print(f"saved {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
