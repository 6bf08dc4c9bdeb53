"""What the scripts of the lectures share: command line, style of the pictures, surfaces, data and training."""

from __future__ import annotations

import argparse
import importlib
import inspect
import io
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar


def need(name: str) -> Any:
    """The module; without it one line says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = str(error.name).partition(".")[0]
        package = {"sklearn": "scikit-learn", "PIL": "pillow"}.get(missing, missing)
        print(f"the lectures need {package}, which is not installed: pip install {package}", file=sys.stderr)
        raise SystemExit(2) from None


for _name in ("numpy", "torch", "onepass", "matplotlib", "PIL.Image"):
    need(_name)

import matplotlib as mpl  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.axes import Axes as Axes  # noqa: E402
from matplotlib.figure import Figure as Figure  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402

Array = NDArray[Any]
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]  # a list of parameters -> their optimizer
Result = TypeVar("Result")
Compute = Callable[[bool], Result]
Check = Callable[[Result], None]
# Draws on the figure. An animation is a generator: a frame is what the figure shows at a yield.
Draw = Callable[[Result, "Figure"], "Iterator[None] | None"]

# The colours of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"
GREY, BLACK = "#999999", "#222222"
SIZE, DPI, COLOURS, FRAME_MS = (8.0, 4.0), 110, 96, 120
STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}

# ---- the command line and the picture ------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def main(text: str | None, compute: Compute[Result], check: Check[Result], draw: Draw[Result]) -> None:
    """What `python examples/lectures/NAME.py` does: compute, check the claim, save the picture."""
    lines = (text or "").splitlines()
    ending = suffix(draw)
    parser = Parser(description=lines[0], epilog=" ".join(lines[2:]))
    parser.add_argument("--quick", action="store_true", help="a smaller experiment with the same claim")
    parser.add_argument("--out", type=Path, default=Path(sys.argv[0]).with_suffix(ending).name, help=f"a {ending} file")
    args = parser.parse_args()
    out = Path(args.out)
    if out.suffix != ending or not out.parent.is_dir():
        parser.error(f"--out needs a file in an existing folder that ends in {ending}, not {str(out)!r}")
    torch.set_num_threads(1)  # networks this small are no faster on more threads
    result = compute(args.quick)
    check(result)
    save(result, draw, out)
    print(f"{lines[0]} The claim holds. Picture: {out}")


def suffix(draw: Draw[Any]) -> str:
    """Of the picture: an animation, which a generator draws, is a GIF."""
    return ".gif" if inspect.isgeneratorfunction(draw) else ".png"


def save(result: Result, draw: Draw[Result], path: Path) -> None:
    """Draw the figure and write it with a palette, as a PNG or an animated GIF; nothing half written."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")

        def picture() -> Image.Image:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            return Image.open(buffer).convert("RGB")

        frames = draw(result, figure)
        if frames is None:
            images = [picture()]
        else:
            images = []
            for _ in frames:
                images.append(picture())
                figure.set_layout_engine("none")  # the places of the first frame are those of all
    palette = images[-1].quantize(COLOURS, dither=Image.Dither.NONE)
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=path.suffix, delete=False) as file:
        durations = [FRAME_MS] * (len(images) - 1) + [3000]  # the last one stays
        if frames is None:
            images[0].save(file, format="png", optimize=True)
        else:
            images[0].save(file, format="gif", save_all=True, append_images=images[1:], duration=durations, loop=0)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


# ---- surfaces and paths --------------------------------------------------------------------------------------------

Loss = Callable[[Tensor], Tensor]


def descend(loss: Loss, start: float | Sequence[Any] | Array, make: Make, steps: int, schedule: Any = None) -> Array:
    """The points that an optimizer visits, [steps + 1, ...]; it steps by closure, as Lookahead and SAM need it.

    A start of several rows is several runs at once; the loss is then their sum. `schedule` makes a learning-rate
    scheduler of an optimizer.
    """
    point = nn.Parameter(torch.tensor(np.asarray(start, dtype=np.float64)))
    optimizer = make([point])
    scheduler = schedule(optimizer) if schedule else None

    def closure() -> float:
        optimizer.zero_grad()
        value = loss(point)
        value.backward()  # type: ignore[no-untyped-call]
        return value.item()

    path = [point.detach().numpy().copy()]
    for _ in range(steps):
        optimizer.step(closure)
        if scheduler:
            scheduler.step()
        path.append(point.detach().numpy().copy())
    return np.stack(path)


def along(loss: Loss, path: Array) -> Array:
    """The loss at every point of a path."""
    values: Array = loss(torch.tensor(path).movedim(-1, 0)).numpy()
    return values


def quadratic(*curvatures: float) -> Loss:
    """Half the sum of curvature times coordinate squared; coordinates come first, as in all surfaces."""

    def loss(w: Tensor) -> Tensor:
        return sum((c * w[i] ** 2 / 2 for i, c in enumerate(curvatures)), start=torch.zeros(()))

    return loss


def level_lines(axes: Axes, loss: Loss, x: tuple[float, float], y: tuple[float, float], log: bool = True) -> None:
    """The level lines of a surface of two coordinates, as a background."""
    grid = torch.meshgrid(*(torch.linspace(*side, 121, dtype=torch.float64) for side in (x, y)), indexing="xy")
    height = loss(torch.stack(grid)).numpy()
    if log:
        height = np.log10(height - height.min() + 1e-2 * np.ptp(height))
    axes.contourf(*(side.numpy() for side in grid), height, 12, cmap="Greys", alpha=0.3)
    axes.contour(*(side.numpy() for side in grid), height, 12, colors=GREY, linewidths=0.5, linestyles="solid")
    axes.set(xlim=x, ylim=y)


def slope(x: Any, y: Any) -> float:
    """The slope of log y against log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


# ---- data, networks and training -----------------------------------------------------------------------------------


class Digits(NamedTuple):
    """8 x 8 images of handwritten digits from scikit-learn; a fifth is held out for the test."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits() -> Digits:
    pixels, labels = need("sklearn.datasets").load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    test = len(y) // 5
    return Digits(x[test:], y[test:], x[:test], y[:test])


def mlp(*widths: int, act: type[nn.Module] = nn.ReLU, norm: Any = None, seed: int = 0) -> nn.Sequential:
    """Linear layers with an activation, and a norm in front of it if there is one, after all but the last."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (inp, out) in enumerate(itertools.pairwise(widths)):
        layers.append(nn.Linear(inp, out))
        if i < len(widths) - 2:
            layers += [*([norm(out)] if norm else []), act()]
    return nn.Sequential(*layers)


def batches(data: Digits, size: int, epochs: float, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches; what does not fill the last batch of an epoch is left out."""
    generator = torch.Generator().manual_seed(seed)
    per_epoch = max(1, len(data.y) // size)
    left = round(per_epoch * epochs)
    while left > 0:
        order = torch.randperm(len(data.y), generator=generator)
        for i in range(min(left, per_epoch)):
            batch = order[i * size : (i + 1) * size]
            yield data.x[batch], data.y[batch]
        left -= per_epoch


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterable[tuple[Tensor, Tensor]],
    scheduler: Any = None,
    after: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train a classifier; the loss of every batch. `after` is called after every step."""
    model.train()
    losses = []
    for x, y in data:

        def closure(x: Tensor = x, y: Tensor = y) -> float:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.item()

        losses.append(float(optimizer.step(closure)))
        if scheduler:
            scheduler.step()
        after()
    return losses


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Loss and share of errors in evaluation mode."""
    model.eval()
    out = model(x)
    return float(nn.functional.cross_entropy(out, y)), float((out.argmax(1) != y).double().mean())


def smooth(values: Sequence[float] | Array, width: int) -> Array:
    """The running mean of the last `width` values; infinite where a run has diverged."""
    padded = np.concatenate([np.full(width - 1, values[0]), np.asarray(values, dtype=np.float64)])
    means: Array = np.convolve(padded, np.full(width, 1 / width), "valid")
    return means
