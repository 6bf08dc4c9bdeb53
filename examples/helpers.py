"""What the examples share: what they need, the command line, the progress bar, the picture, groups of processes."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar


def need(*names: str) -> None:
    """Ends the program with one line if a module that it imports is not installed."""
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            package = {"sklearn": "scikit-learn"}.get(str(error.name), error.name)
            refuse(f"{Path(sys.argv[0]).name} needs {package}, which is not installed: pip install {package}")


def refuse(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(2)


need("numpy", "torch", "onepass", "sklearn.datasets", "tqdm")

import onepass  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.multiprocessing.spawn import spawn  # noqa: E402
from tqdm import tqdm  # type: ignore[import-untyped] # noqa: E402

ORANGE, BLUE = "#e69f00", "#0072b2"  # torch and onepass; colour-blind readers can tell them apart
Item = TypeVar("Item")


def mlp() -> torch.nn.Module:
    """A network for the 64 pixels of a digit."""
    hidden = [layer for _ in range(4) for layer in (torch.nn.Linear(128, 128), torch.nn.Tanh())]
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), *hidden, torch.nn.Linear(128, 10))


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def options(text: str | None, picture: bool = False) -> argparse.Namespace:
    """--quick, and --out if there is a picture; says which versions run, on one thread."""
    parser = Parser(description=(text or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, to show that everything works")
    if picture:
        need("matplotlib.figure")
        name = Path(sys.argv[0]).with_suffix(".png").name
        parser.add_argument("--out", type=Path, default=Path(name), help=f"file of the picture (default {name})")
    args = parser.parse_args()
    if picture and (args.out.suffix != ".png" or not args.out.parent.is_dir()):
        parser.error(f"--out needs a .png file in an existing folder, not '{args.out}'")
    torch.set_num_threads(1)  # networks this small are no faster on more threads
    print(f"onepass {onepass.__version__}, torch {torch.__version__}")
    return args


def progress(items: Iterable[Item], text: str, total: int) -> Iterable[Item]:
    """With a bar on a terminal, and without in a log."""
    bar: Iterable[Item] = tqdm(items, desc=text, total=total, unit="step", disable=None, leave=False)
    return bar


def save(figure: Any, path: Path) -> None:
    """Write the picture; nothing is half written."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        figure.savefig(Path(folder, path.name), dpi=120)
        os.replace(Path(folder, path.name), path)
    print(f"picture: {path}")


def same_losses(ours: list[float], theirs: list[float], tolerance: float) -> bool:
    """Says whether the losses of each step are the same; two programs that round differently drift apart slowly."""
    largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    verdict = "the same" if largest <= tolerance else "NOT the same"
    print(f"losses of torch and onepass over {len(ours)} steps: {verdict} (largest difference {largest:.1e})")
    return largest <= tolerance


def compare_runs(results: dict[str, Any], steps: int) -> bool:
    """Of "torch", "onepass", and "resumed", which was stopped in the middle."""
    for name, result in results.items():
        losses = result["losses"]
        print(f"{name:<8} loss {losses[0]:.4f} -> {losses[-1]:.4f}, {result['ms']:.1f} ms per step")
    same = same_losses(results["onepass"]["losses"], results["torch"]["losses"], 1e-3)
    ours, resumed = results["onepass"]["model"], results["resumed"]["model"]
    bits = ours.keys() == resumed.keys() and all(torch.equal(value, resumed[name]) for name, value in ours.items())
    print(
        f"stopped after {steps // 2} of {steps} steps and resumed: {'the same bits' if bits else 'NOT the same bits'}"
    )
    return same and bits


def in_group(work: Callable[..., None], *calls: tuple[object, ...], processes: int = 2) -> None:
    """work(rank, *call) for one call after the other, in new processes that talk over gloo."""
    if not dist.is_available():
        refuse("this torch was built without torch.distributed")
    with tempfile.TemporaryDirectory() as folder:
        spawn(_member, (processes, f"file://{folder}/store", work, calls), nprocs=processes)  # type: ignore[no-untyped-call]


def _member(
    rank: int, processes: int, store: str, work: Callable[..., None], calls: tuple[tuple[object, ...], ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    for call in calls:
        work(rank, *call)
    dist.barrier()
    dist.destroy_process_group()
