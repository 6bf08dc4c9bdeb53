"""The picture on each rule's page: the path of the shipped optimizer down an elongated valley.

    python docs/paths.py    # writes docs/rules/*.svg

The loss is (x^2 + 12 y^2) / 2: gradients differ in size by direction, as those of features of different scale do. Every
path starts at the same point; plain gradient descent is the grey one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onepass
import torch
from onepass import optim

RULES = Path(__file__).parent / "rules"
START = (-9.0, 2.5)
CURVATURES = torch.tensor([1.0, 12.0])
WIDTH, HEIGHT, SCALE = 480, 190, 22.0  # pixels, and pixels per unit; the minimum is right of the middle
CENTRE = (290.0, 82.0)

Point = tuple[float, float]
Make = Callable[[torch.nn.Parameter], torch.optim.Optimizer]


# Rule -> optimizer and what the picture says about it.
OPTIMIZERS: dict[str, tuple[Make, str]] = {
    "sgd": (lambda w: optim.SGD([w], lr=0.03, momentum=0.8), "momentum 0.8: steps along the valley add up"),
    "adagrad": (lambda w: optim.Adagrad([w], lr=1.5), "both directions at the same pace, in ever shorter steps"),
    "rmsprop": (
        lambda w: optim.RMSprop([w], lr=0.3, alpha=0.9),
        "both directions at the same pace; old gradients fade",
    ),
    "adam": (lambda w: optim.Adam([w], lr=0.5), "the size of the gradient does not count; momentum overshoots"),
    "nadam": (lambda w: optim.NAdam([w], lr=0.5, momentum_decay=0), "looks ahead, and overshoots less than Adam"),
    "radam": (
        lambda w: optim.RAdam([w], lr=0.15, betas=(0.9, 0.95)),
        "plain momentum at first, then short steps of Adam's kind",
    ),
    "adamax": (lambda w: optim.Adamax([w], lr=0.5), "the largest recent gradient of a direction sets its pace"),
    "adadelta": (lambda w: optim.Adadelta([w], eps=1e-2), "both directions at one pace, which past steps set"),
    "lion": (lambda w: optim.Lion([w], lr=0.3), "every step is as long, in each direction, as any other"),
    "asgd": (
        lambda w: optim.ASGD([w], lr=0.15, lambd=1e-2, t0=1),
        "the average of the weights; they zigzag across the valley",
    ),
    "rprop": (lambda w: optim.Rprop([w], lr=0.3), "one step size per direction, grown and halved by signs alone"),
    "sparse_adam": (lambda w: optim.SparseAdam([w], lr=0.5), "y has a gradient in every third step"),
    "lookahead": (
        lambda w: optim.Lookahead(optim.SGD([w], lr=0.08, momentum=0.6)),
        "every fifth step goes half of the way back",
    ),
    "sam": (
        lambda w: optim.SAM([w], optim.SGD, rho=0.3, lr=0.06),
        "gradients from a point uphill, where the valley is steeper",
    ),
}


def path_of(make: Make, steps: int, sparse: bool = False) -> list[Point]:
    w = torch.nn.Parameter(torch.tensor(START).unsqueeze(1))  # one row per direction
    optimizer = make(w)
    points = [START]
    for step in range(steps):

        def closure(step: int = step) -> torch.Tensor:
            w.grad = CURVATURES.unsqueeze(1) * w.detach()
            if sparse:
                rows = torch.tensor([0, 1] if step % 3 == 0 else [0])
                w.grad = torch.sparse_coo_tensor(rows.unsqueeze(0), w.grad[rows], w.shape, check_invariants=True)
            return (CURVATURES * w.detach().squeeze() ** 2).sum() / 2

        optimizer.step(closure)  # type: ignore[arg-type]
        x, y = optimizer.state[w].get("ax", w.detach()).squeeze().tolist()  # ASGD's average
        points.append((x, y))
    return points


def pixels(points: list[Point]) -> list[Point]:
    return [(CENTRE[0] + SCALE * x, CENTRE[1] - SCALE * y) for x, y in points]


def line(points: list[Point], colour: str, radius: float) -> str:
    at = [(f"{x:.0f}", f"{y:.0f}") for x, y in pixels(points)]
    dots = "".join(f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{colour}"/>' for x, y in at)
    joined = " ".join(f"{x},{y}" for x, y in at)
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.5"/>\n{dots}\n'


def picture(title: str, caption: str, path: list[Point], descent: list[Point]) -> str:
    levels = "".join(
        f'<ellipse cx="{CENTRE[0]:.0f}" cy="{CENTRE[1]:.0f}" rx="{SCALE * r:.0f}" ry="{SCALE * r / 12**0.5:.0f}" fill="none" stroke="#c9d3e3"/>'
        for r in (2, 4, 6, 8, 10, 12)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="13" fill="#222">\n<title>{title}: {caption}</title>\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#fff"/>\n{levels}\n'
        f"{line(descent, '#b5b5b5', 1.5)}{line(path, '#c44e52', 2)}"
        f'<text x="12" y="{HEIGHT - 10}">{title}: {caption}</text>\n</svg>\n'
    )


def pictures() -> dict[str, str]:
    """Rule -> the text of its picture."""
    steps = 40
    descent = path_of(lambda w: optim.SGD([w], lr=0.03), steps)
    found = {}
    for rule, (make, caption) in OPTIMIZERS.items():
        names = [name for name in dir(optim) if name.lower() == rule.replace("_", "")]
        found[rule] = picture(names[0], caption, path_of(make, steps, rule == "sparse_adam"), descent)
    return found


if __name__ == "__main__":
    print(onepass.show_config())
    for rule, text in pictures().items():
        (RULES / f"{rule}.svg").write_text(text)
