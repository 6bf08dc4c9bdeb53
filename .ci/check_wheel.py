"""Check that a finished wheel holds the package and nothing else.

    python .ci/check_wheel.py WHEEL...

1. Its tag is a manylinux one.
2. It has one compiled file, the extension: no vendored OpenMP, CUDA, C++ or torch library.
3. The extension needs no library and no symbol beyond those that check_symbols.py allows, and has no run path.
4. Its other files are those of the sources.
5. It requires torch and numpy, and carries the licence.
"""

from __future__ import annotations

import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

from check_symbols import foreign_libraries, foreign_symbols

SOURCES = Path(__file__).resolve().parents[1] / "python"
COMPILED = r"\.(so|a|o|dylib|dll|pyd)(\.\d+)*$"


def faults(wheel: Path) -> Iterator[str]:
    *_, platform = wheel.stem.split("-")
    if not all(tag.startswith("manylinux") for tag in platform.split(".")):
        yield f"the platform {platform} is not manylinux: repair it with auditwheel"
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        compiled = [name for name in names if re.search(COMPILED, name)]
        extensions = [name for name in compiled if re.fullmatch(r"onepass/_C\.[^/]*\.so", name)]
        if len(extensions) != 1:
            yield f"expected one extension onepass/_C.*.so, found {extensions}"
        yield from (f"unexpected compiled file {name}" for name in sorted({*compiled} - {*extensions}))
        yield from (
            f"unexpected folder of libraries {name}" for name in sorted({n for n in tops(names) if "libs" in n})
        )
        for name in extensions:
            extension = Path(archive.extract(name, folder))
            yield from (f"the extension needs the library {line}" for line in foreign_libraries(extension))
            yield from (f"the extension needs the symbol {line}" for line in foreign_symbols(extension))

        packed = {name for name in names if name.startswith("onepass/")} - {*compiled}
        wanted = {
            str(path.relative_to(SOURCES))
            for path in SOURCES.rglob("*")
            if path.suffix in (".py", ".pyi", ".typed", ".html")
        }
        yield from (f"{name} is missing" for name in sorted(wanted - packed))
        yield from (f"{name} is not of the sources" for name in sorted(packed - wanted))

        (info,) = (name for name in tops(names) if name.endswith(".dist-info"))
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        required = {
            re.split(r"[^\w-]", text)[0] for text in metadata.get_all("Requires-Dist", []) if "extra" not in text
        }
        if required != {"torch", "numpy"}:
            yield f"it requires {sorted(required)}, expected numpy and torch"
        if not any(name.startswith(info) and name.endswith("LICENSE") for name in names):
            yield "the licence is missing"


def tops(names: list[str]) -> set[str]:
    return {name.split("/")[0] for name in names}


def main() -> int:
    wheels = [Path(argument) for argument in sys.argv[1:]]
    if not wheels or not all(wheel.suffix == ".whl" and wheel.is_file() for wheel in wheels):
        print(f"check_wheel.py: expected existing wheels, got {sys.argv[1:]}", file=sys.stderr)
        return 2
    fine = True
    for wheel in wheels:
        found = list(faults(wheel))
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {len(found)} faults")
        print(*(f"  {fault}\n" for fault in found[:20]), sep="", end="")
        fine = fine and not found
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
