"""How long whole training steps of real models take: torch eager and torch.compile against onepass.

    python benchmarks/training.py --filter 'bert|vit'
    python benchmarks/training.py --no-compile

A step is forward, loss, backward, clipping to a global norm and AdamW (SGD with momentum for the ResNets). Beside torch:
torch.optim (fused) and clip_grad_norm_. Beside onepass: convert(model), patch(), and the same optimizer with max_norm. Rows
without their package (timm, transformers, torchvision: the extra "models") are left out and named.

Columns: the median step in ms; the ratio torch / onepass with its quartiles over interleaved rounds of one step each; the
share of torch's step outside of matrix products and convolutions, which is all that onepass can change, and how many times
less of it is left; the peak memory of a step. Saves <out>/training-<date>-<machine>.json.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import importlib.metadata
import importlib.util
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compiled
import harness
import machine
import report_training
import torch
from harness import OURS, Json, Variant
from machine import onepass
from onepass._cli.demo import PRODUCTS
from torch import Tensor, nn

MAX_NORM = 1.0
_MINI = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}


@dataclass(frozen=True)
class Model:
    """One line of the table."""

    package: str
    make: Callable[[], nn.Module]
    batch: tuple[int, ...]
    sgd: bool = False


def _of_transformers(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers: Any = importlib.import_module("transformers")
        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
        return made

    return make


def _of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made: nn.Module = importlib.import_module("timm").create_model(name, num_classes=100, **options)
        return made

    return make


def _of_torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made: nn.Module = getattr(importlib.import_module("torchvision.models"), name)(num_classes=100)
        return made

    return make


_TEXT = (8, 128)
MODELS = {
    "BERT-mini": Model(
        "transformers",
        _of_transformers("BertForMaskedLM", "BertConfig", vocab_size=2000, intermediate_size=1024, **_MINI),
        _TEXT,
    ),
    "GPT-2-mini": Model(
        "transformers",
        _of_transformers("GPT2LMHeadModel", "GPT2Config", vocab_size=2000, n_embd=256, n_layer=4, n_head=4),
        _TEXT,
    ),
    "Llama-mini": Model(
        "transformers",
        _of_transformers("LlamaForCausalLM", "LlamaConfig", vocab_size=2000, intermediate_size=688, **_MINI),
        _TEXT,
    ),
    "T5-mini": Model(
        "transformers",
        _of_transformers(
            "T5ForConditionalGeneration",
            "T5Config",
            **{"vocab_size": 2000, "d_model": 256, "d_ff": 1024, "num_layers": 4, "num_heads": 4},
            decoder_start_token_id=0,
        ),
        _TEXT,
    ),
    "ResNet-18": Model("torchvision", _of_torchvision("resnet18"), (16, 3, 112, 112), sgd=True),
    "ResNet-50": Model("torchvision", _of_torchvision("resnet50"), (8, 3, 112, 112), sgd=True),
    "MobileNetV3": Model("timm", _of_timm("mobilenetv3_small_100"), (16, 3, 112, 112)),
    "ViT-tiny": Model(
        "timm",
        _of_timm("vit_tiny_patch16_224", img_size=112, proj_drop_rate=0.1, attn_drop_rate=0.1),
        (16, 3, 112, 112),
    ),
    "ConvNeXt-atto": Model("timm", _of_timm("convnext_atto"), (8, 3, 112, 112)),
}


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    if batch.dtype == torch.int64:
        loss: Tensor = model(input_ids=batch, labels=batch).loss
        return loss
    return model(batch).square().mean()  # type: ignore[no-any-return]


def steps(model: Model, device: torch.device, compiles: bool) -> list[Variant]:
    """A training step of each variant; the models are equal."""
    torch.manual_seed(0)
    theirs = model.make().to(device).train()
    batch = torch.randint(0, 2000, model.batch) if len(model.batch) == 2 else torch.randn(model.batch)
    batch = batch.to(device)

    def of_torch(name: str, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Variant:
        params = list(module.parameters())
        optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(params, 0.01, 0.9, fused=True) if model.sgd else torch.optim.AdamW(params, 1e-4, fused=True)
        )

        def step() -> None:
            optimizer.zero_grad()
            forward(batch).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(params, MAX_NORM)
            optimizer.step()

        return Variant(name, step)

    def of_onepass(module: nn.Module) -> Variant:
        onepass.convert(module)
        kind, options = (onepass.optim.SGD, {"momentum": 0.9}) if model.sgd else (onepass.optim.AdamW, {})
        optimizer = kind(module.parameters(), lr=0.01 if model.sgd else 1e-4, max_norm=MAX_NORM, **options)

        def step() -> None:
            optimizer.zero_grad()
            with onepass.patch():
                loss_of(module, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        return Variant(OURS, step)

    variants = [of_onepass(copy.deepcopy(theirs))]
    if compiles:
        twin = copy.deepcopy(theirs)
        variants.append(of_torch(compiled.NAME, twin, compiled.compile_(lambda batch: loss_of(twin, batch))))
    return [of_torch("torch", theirs, lambda batch: loss_of(theirs, batch)), *variants]


def measure(name: str, model: Model, device: torch.device, seconds: float, no_compile: str) -> Json:
    """The numbers of one model; ``no_compile``: why torch.compile is left out, if it is."""
    variants = steps(model, device, not no_compile)
    compilation = compiled.left_out(no_compile)
    if not no_compile:
        compilation = compiled.first_call(variants[-1].run)
        variants = variants[: -1 if "left_out" in compilation else None]
    results = harness.measure(variants, device, seconds=seconds, min_rounds=6, warm_up=3)
    row: Json = {"name": name, "compile": compilation} | harness.results(results)
    for variant in variants:
        numbers = row["variants"][variant.name]
        products = statistics.median(share_of_products(variant) for _ in range(5))
        numbers["outside_ms"] = numbers["median_ms"] * (1 - products)
        numbers["peak_bytes"] = harness.peak_memory(variant.run, device)
    return row


def share_of_products(variant: Variant) -> float:
    """The share of one step that is spent in matrix products and convolutions."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        variant.run()
    events = profile.key_averages()
    products = sum(e.self_cpu_time_total for e in events if PRODUCTS.search(e.key))
    return float(products / sum(e.self_cpu_time_total for e in events))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="", help="regular expression on the model's name")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes most of the time"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="per model")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and onepass.has_cuda else "cpu")
    no_compile = "--no-compile" if args.no_compile else compiled.unavailable()
    rows = []
    for name, model in MODELS.items():
        if not re.search(args.filter, name, re.IGNORECASE):
            continue
        if importlib.util.find_spec(model.package) is None:
            print(f"{name}: left out, {model.package} is not installed", file=sys.stderr)
            continue
        rows.append(measure(name, model, device, args.seconds, no_compile))
        print(report_training.line(rows[-1]), flush=True)
        gc.collect()
    if not rows:
        print("no model is left to measure", file=sys.stderr)
        return 1
    print(f"geometric mean: {report_training.mean(rows):.3f}")
    environment = machine.environment(device)
    packages = {MODELS[row["name"]].package for row in rows}
    environment["versions"] |= {name: importlib.metadata.version(name) for name in sorted(packages)}
    harness.save({"benchmark": "training", "environment": environment, "rows": rows}, args.out, "training")
    return 0


if __name__ == "__main__":
    sys.exit(main())
