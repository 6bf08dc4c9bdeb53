"""The scripts of the lectures: the claim of each in its quick mode, their command line, the page made from them."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for needed in ("matplotlib", "sklearn", "PIL"):
    pytest.importorskip(needed)

ROOT = Path(__file__).parent.parent
LECTURES = ROOT / "examples" / "lectures"
sys.path.append(str(LECTURES))

import common  # noqa: E402
import gallery  # noqa: E402
from PIL import Image  # noqa: E402

SCRIPTS = gallery.scripts()
LEAST = "momentum_nesterov"  # a quick one, without data


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(script: str, *args: str, without: str = "") -> subprocess.CompletedProcess:
    """The script in a process of its own, one in which a module cannot be imported."""
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(LECTURES)!r}); sys.argv = {[script + '.py', *args]!r}\n"
        f"if {without!r}: sys.modules[{without!r}] = None\n"
        f"runpy.run_path({str(LECTURES / script)!r} + '.py', run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_claim_holds(name: str) -> None:
    module = importlib.import_module(name)
    result = module.compute(True)
    module.check(result)
    frames = module.draw(result, common.Figure(figsize=common.SIZE, layout="constrained"))
    if frames is not None:
        next(frames)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short_and_says_what_it_shows(name: str) -> None:
    text = (LECTURES / f"{name}.py").read_text()
    assert text.count("\n") <= 80
    title, _, rest = importlib.import_module(name).__doc__.partition("\n\n")
    assert title.endswith((".", ")")) or "." in title
    assert "\n" not in title
    assert 2 <= len(re.findall(r"[.:] |\.$", rest.strip())) <= 7, "two or three sentences, or a few short ones"


def test_the_page_is_made_from_the_scripts() -> None:
    """`make lectures` makes it anew."""
    assert (ROOT / "docs" / "lectures.md").read_text() == gallery.page("lectures")


def test_every_picture_is_there_and_small() -> None:
    folder = ROOT / "docs" / "lectures"
    expected = {name + common.suffix(importlib.import_module(name).draw) for name in SCRIPTS}
    assert {path.name for path in folder.iterdir()} == expected
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2_000_000
    for path in folder.iterdir():
        with Image.open(path) as image:
            assert image.width >= 800, path.name
            assert getattr(image, "n_frames", 1) > 20 or path.suffix == ".png", path.name


def test_a_script_alone(tmp_path: Path) -> None:
    done = run(LEAST, "--quick", "--out", str(tmp_path / "picture.png"))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    with Image.open(tmp_path / "picture.png") as image:
        assert image.mode == "P"


def test_an_animation_has_all_its_frames(tmp_path: Path) -> None:
    def draw(result: int, figure: common.Figure):
        (line,) = figure.subplots().plot([0, 1], [0, 1])
        for i in range(result):
            line.set_ydata([0, i])
            yield

    assert common.suffix(draw) == ".gif"
    common.save(4, draw, tmp_path / "moving.gif")
    with Image.open(tmp_path / "moving.gif") as image:
        assert image.n_frames == 4


@pytest.mark.parametrize(
    ("args", "without", "said"),
    [
        (["--fast"], "", "--fast"),
        (["--out", "picture.jpg"], "", "ends in .png, not 'picture.jpg'"),
        (["--out", "missing/picture.png"], "", "existing folder"),
        ([], "matplotlib", "pip install matplotlib"),
        ([], "PIL", "pip install pillow"),
        ([], "sklearn", "pip install scikit-learn"),
    ],
)
def test_one_clear_line_and_exit_code_2(args: list[str], without: str, said: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("descent_batches" if without == "sklearn" else LEAST, *args, without=without)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr
    assert not done.stdout
    assert not [*tmp_path.iterdir()]
