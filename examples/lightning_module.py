"""A LightningModule with onepass: layers converted in its constructor, the optimizer in configure_optimizers.

    python examples/lightning_module.py [--quick]

Needs lightning.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from typing import Any

from helpers import need, options, same_losses

need("lightning")

import lightning  # type: ignore[import-not-found, unused-ignore] # noqa: E402
import onepass  # noqa: E402
import torch  # noqa: E402
from onepass._cli.demo_data import Digits  # noqa: E402
from torch import Tensor, nn  # noqa: E402


class Reader(lightning.LightningModule):  # type: ignore[misc, unused-ignore]
    """Reads digits; `library` says whose layers and optimizer."""

    def __init__(self, library: str) -> None:
        super().__init__()
        hidden = [layer for _ in range(3) for layer in (nn.Linear(128, 128), nn.LayerNorm(128), nn.GELU())]
        self.model = nn.Sequential(nn.Linear(64, 128), *hidden, nn.Linear(128, 10))
        self.library, self.losses, self.right = library, list[float](), 0.0
        if library == "onepass":
            onepass.convert(self.model)

    def training_step(self, batch: Any) -> Tensor:
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self.model(inputs), targets)
        self.losses.append(loss.item())
        return loss

    def test_step(self, batch: Any) -> None:
        inputs, targets = batch
        self.right = (self.model(inputs).argmax(1) == targets).double().mean().item()

    def configure_optimizers(self) -> Any:
        if self.library == "onepass":
            return onepass.optim.AdamW(self.parameters(), lr=1e-3)
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)


def train(library: str, digits: Digits, epochs: int) -> list[float]:
    lightning.seed_everything(0, verbose=False)
    module = Reader(library)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(), gradient_clip_val=1.0,
    )  # fmt: skip
    data = torch.utils.data.TensorDataset
    batches: Any = torch.utils.data.DataLoader(
        data(digits.train_images, digits.train_labels), Digits.batch, shuffle=True
    )
    test: Any = torch.utils.data.DataLoader(data(digits.test_images, digits.test_labels), len(digits.test_labels))
    begin = time.perf_counter()
    trainer.fit(module, batches)
    ms = 1e3 * (time.perf_counter() - begin) / len(module.losses)
    trainer.test(module, test, verbose=False)
    print(
        f"{library:<8} loss {module.losses[0]:.4f} -> {module.losses[-1]:.4f}, "
        f"{module.right:.1%} of the test read right, {ms:.2f} ms per step"
    )
    return module.losses


def main() -> int:
    epochs = 1 if options(__doc__).quick else 20
    # It advises more workers for loading, which for data in memory would be slower.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    digits = Digits()
    theirs, ours = (train(library, digits, epochs) for library in ("torch", "onepass"))
    return 0 if same_losses(ours, theirs, 1e-2) else 1


if __name__ == "__main__":
    sys.exit(main())
