"""Build every picture of the lectures and the page that shows them.

    python examples/lectures/gallery.py [--quick] [--only WORD] [--pictures FOLDER] [--page FILE]

The page is made from the docstrings of the scripts: the first line is the title, the rest the text. The first word of a
script's name is its section.
"""

from __future__ import annotations

import importlib
import os
import time
import traceback
from pathlib import Path
from types import ModuleType

import torch
from common import Parser, save, suffix

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SECTIONS = {
    "descent": "Gradient descent, whole and stochastic",
    "momentum": "Momentum",
    "adaptive": "A step size for every weight",
    "landscape": "The landscape of the loss",
    "batch": "The size of the batch",
    "schedule": "Learning-rate schedules",
    "depth": "Deep networks: exploding and vanishing gradients",
    "layer": "Layers: dropout, norms, activations",
    "machine": "Machines: several processes, several devices, bandwidth",
}
HEAD = """# The lectures, alive

Each picture comes from one short script, which computes it with the optimizers and layers of onepass, checks its own claim
and needs no network: `python examples/lectures/NAME.py [--quick] [--out FILE]`. `make lectures` builds all of them and
this page. The tests run every script in its quick mode.
"""


def scripts() -> list[str]:
    """Names of the scripts in the order of the page."""
    names = [path.stem for path in HERE.glob("*_*.py")]
    return sorted(names, key=lambda name: ([*SECTIONS].index(name.partition("_")[0]), name))


def entry(name: str, module: ModuleType, pictures: str) -> str:
    title, _, text = (module.__doc__ or "").partition("\n")
    path = (HERE / name).relative_to(ROOT)
    return f"### {title.rstrip('.')}\n\n![{title}]({pictures}/{name}{suffix(module.draw)})\n\n{text.strip()}\n\nScript: `{path}.py`\n"


def page(pictures: str) -> str:
    parts, section = [HEAD], ""
    for name in scripts():
        if name.partition("_")[0] != section:
            section = name.partition("_")[0]
            parts.append(f"## {SECTIONS[section]}\n")
        parts.append(entry(name, importlib.import_module(name), pictures))
    return "\n".join(parts)


def main() -> int:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller experiments")
    parser.add_argument("--only", default="", help="scripts with this word in their names; the page is left as it is")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "lectures", help="folder of the pictures")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "lectures.md", help="file of the page")
    args = parser.parse_args()
    chosen = [name for name in scripts() if args.only in name]
    if not chosen:
        parser.error(f"no script has {args.only!r} in its name; the scripts are {', '.join(scripts())}")
    if not args.page.parent.is_dir():
        parser.error(f"--page needs a file in an existing folder, not {str(args.page)!r}")
    torch.set_num_threads(1)
    args.pictures.mkdir(parents=True, exist_ok=True)
    failed, begin = [], time.perf_counter()
    for name in chosen:
        start = time.perf_counter()
        try:
            module = importlib.import_module(name)
            picture = args.pictures / (name + suffix(module.draw))
            result = module.compute(args.quick)
            module.check(result)
            save(result, module.draw, picture)
        except Exception:  # the others are still built
            traceback.print_exc()
            failed.append(name)
            continue
        kilobytes = picture.stat().st_size / 1024
        print(f"{name:28} {time.perf_counter() - start:5.1f} s  {kilobytes:4.0f} KB", flush=True)
    if not failed and not args.only:
        args.page.write_text(page(os.path.relpath(args.pictures, args.page.parent)))
    print(f"{len(chosen)} pictures in {args.pictures}, {time.perf_counter() - begin:.0f} s; failed: {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
