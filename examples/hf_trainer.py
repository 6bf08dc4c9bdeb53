"""transformers.Trainer with onepass: a small GPT-2 from scratch, its norms and dropouts converted, AdamW passed in.

    python examples/hf_trainer.py [--quick]

Nothing is downloaded: the text is Python's help, character by character. Needs transformers and accelerate.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from typing import Any

from helpers import need, options, same_losses

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
need("transformers", "accelerate")

import onepass  # noqa: E402
import torch  # noqa: E402
import transformers  # type: ignore[import-not-found, unused-ignore] # noqa: E402
from onepass._cli.demo_data import HelpText  # noqa: E402


class Pieces(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Pieces of the text, one after the other; the model shifts the labels itself."""

    def __init__(self, text: HelpText) -> None:
        self.rows = text.train[: len(text.train) // text.context * text.context].view(-1, text.context)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def train(library: str, text: HelpText, steps: int, folder: str) -> list[float]:
    transformers.logging.set_verbosity_error()
    transformers.set_seed(0)
    # Without dropout, whose masks would differ, the losses can be compared.
    config = transformers.GPT2Config(
        vocab_size=text.characters, n_positions=text.context, n_embd=64, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: Any = transformers.GPT2LMHeadModel(config)
    if library == "onepass":
        onepass.convert(model)
        optimizer: torch.optim.Optimizer = onepass.optim.AdamW(model.parameters(), lr=3e-3)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=16, logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, dataloader_pin_memory=False, disable_tqdm=not sys.stderr.isatty(),
    )  # fmt: skip
    # The Trainer clips (max_grad_norm=1) and makes the schedule for the optimizer that it is given.
    trainer = transformers.Trainer(model, arguments, train_dataset=Pieces(text), optimizers=(optimizer, None))
    trainer.remove_callback(transformers.PrinterCallback)
    begin = time.perf_counter()
    trainer.train()
    ms = 1e3 * (time.perf_counter() - begin) / steps
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    print(f"{library:<8} loss {losses[0]:.4f} -> {losses[-1]:.4f}, {ms:.2f} ms per step")
    return losses


def main() -> int:
    steps = 10 if options(__doc__).quick else 200
    text = HelpText()
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = (train(library, text, steps, folder) for library in ("torch", "onepass"))
    return 0 if same_losses(ours, theirs, 2e-3) else 1


if __name__ == "__main__":
    sys.exit(main())
