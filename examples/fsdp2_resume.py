"""FSDP2 in two processes: sharded layers and states, a distributed checkpoint, and a resumed run with the same bits.

    python examples/fsdp2_resume.py [--quick]

Each process holds half of every parameter and of both its Adam states, and writes its half of the checkpoint.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from helpers import compare_runs, in_group, need, options, refuse

need("torch.distributed.fsdp", "torch.distributed.checkpoint")

import onepass  # noqa: E402
import torch  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
import torch.distributed.fsdp as fsdp  # noqa: E402
from onepass._cli.demo_data import HelpText  # noqa: E402
from onepass._cli.demo_networks import CharacterGPT  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402


def train(rank: int, library: str, first: int, last: int, folder: Path) -> None:
    """Steps first to last of a training; steps after the first one continue from the checkpoint in the folder."""
    text = HelpText()
    torch.manual_seed(0)
    model = CharacterGPT(text.characters, text.context, dropout=0.0)
    if library == "onepass":
        onepass.convert(model)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fsdp.fully_shard(block, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    make: Any = onepass.optim.AdamW if library == "onepass" else torch.optim.AdamW
    optimizer = make(model.parameters(), lr=1e-3)  # after sharding: the optimizer has to see the shards
    losses = []
    if first > 0:
        weights, states = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": states}, checkpoint_id=folder / f"step-{first}")  # type: ignore[attr-defined]
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
        losses = torch.load(folder / "result.pt", weights_only=True)["losses"]

    # Its warning is about the output, which is a view; nothing here writes into it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    begin = time.perf_counter()
    for step, (inputs, targets) in enumerate(text.batches(quick=False)):
        if first <= step < last:
            optimizer.zero_grad()
            mine = slice(rank * len(inputs) // 2, (rank + 1) * len(inputs) // 2)
            loss = nn.functional.cross_entropy(model(inputs[mine]), targets.view(len(inputs), -1)[mine].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
    ms = 1e3 * (time.perf_counter() - begin) / (last - first)
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder / f"step-{last}")  # type: ignore[attr-defined]
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save({"model": whole, "losses": losses, "ms": ms}, folder / "result.pt")


def main() -> int:
    steps = 10 if options(__doc__).quick else 150
    if not hasattr(fsdp, "fully_shard"):
        refuse(f"fsdp2_resume.py needs torch >= 2.6, which has fully_shard; this is torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as place:
        folders = {run: Path(place, run) for run in ("torch", "onepass", "resumed")}
        whole = [("torch", 0, steps, folders["torch"]), ("onepass", 0, steps, folders["onepass"])]
        in_group(train, *whole, ("onepass", 0, steps // 2, folders["resumed"]))
        in_group(train, ("onepass", steps // 2, steps, folders["resumed"]))  # these have only the checkpoint
        results = {run: torch.load(folder / "result.pt", weights_only=True) for run, folder in folders.items()}
    return 0 if compare_runs(results, steps) else 1


if __name__ == "__main__":
    sys.exit(main())
