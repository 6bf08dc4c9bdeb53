"""Check what the built extension needs and shares.

1. It links no libtorch, no OpenMP and no CUDA library, which is why one wheel works with every torch.
2. An object compiled for an instruction set defines no symbol outside its own namespace. Otherwise the linker could choose
   an AVX-512 copy of a common inline function for all callers, and older processors would crash in it.
"""

import re
import subprocess
import sys
from pathlib import Path

ALLOWED_LIBRARIES = r"\[(libstdc\+\+|libgcc_s|libc|libm|libdl|libpthread|librt|ld-linux[-\w]*)\.so\.\d+\]"


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def foreign_libraries(extension: Path) -> list[str]:
    """What the loader would look for, and where, beside the C and C++ run time; of any processor's extension."""
    needed = [
        line for line in run("readelf", "-dW", str(extension)).splitlines() if re.search("NEEDED|R(UN)?PATH", line)
    ]
    return [line.split(") ")[1].strip() for line in needed if not re.search(ALLOWED_LIBRARIES, line)]


def foreign_symbols(extension: Path) -> list[str]:
    undefined = run("nm", "-DC", "--undefined-only", str(extension))
    return [
        line.strip() for line in undefined.splitlines() if re.search(r"\b(at|c10|torch)::|GOMP|omp_|\bcuda[A-Z]", line)
    ]


def objects_of(isa: str) -> list[Path]:
    """The objects of all builds but the sanitized ones: sanitizers add symbols of their own."""
    return sorted(item for item in Path("build").glob(f"**/cpu_{isa}.dir/**/*.o") if "sanitized" not in item.parts)


def leaked_symbols() -> list[str]:
    leaks = []
    for isa in ("v3", "v4"):
        for item in objects_of(isa):
            for line in run("nm", "-C", "--defined-only", str(item)).splitlines():
                _, kind, name = line.split(maxsplit=2)
                if kind in "TWVuBDGRS" and f"cpu::{isa}::" not in name and not name.startswith("DW.ref"):
                    leaks.append(f"{item.name}: {name}")
    return leaks


def main() -> int:
    extension = Path(run(sys.executable, "-c", "import onepass._C as c; print(c.__file__)").strip())
    objects = objects_of("v4")
    checks = {
        f"libraries that {extension.name} should not need": foreign_libraries(extension),
        "symbols it should not need": foreign_symbols(extension),
        f"symbols that leave their instruction set ({len(objects)} objects of v4)": leaked_symbols(),
    }
    for what, found in checks.items():
        print(f"{what}: {len(found)}")
        for line in found[:20]:
            print(f"  {line}")
    if not objects:
        print("no objects found under build/: nothing was checked for leaks")
    return 1 if any(checks.values()) or not objects else 0


if __name__ == "__main__":
    sys.exit(main())
