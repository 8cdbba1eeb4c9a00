"""Checks that the wheel in dist/ has git's files of the package, and the sdist those of everything.

Usage: python .ci/check_dist.py, in the root of a clone
"""

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

# What only git and the hosting service read.
LEFT_OUT = (".gitignore", ".gitattributes", ".github/")
# What the build adds, under the name and the version.
ADDED = ("PKG-INFO", "setup.cfg", "gptsmith.egg-info/")


def main() -> int:
    """Print each file that is missing or should not be there; return 1 if there is any, else 0."""
    (wheel,), (sdist,) = (list(Path("dist").glob(kind)) for kind in ("*.whl", "*.tar.gz"))
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout
    files = listed.splitlines()
    with zipfile.ZipFile(wheel) as opened:
        built = [name for name in opened.namelist() if ".dist-info/" not in name]
    broken = differences(wheel, built, [name for name in files if name.startswith("gptsmith/")])
    with tarfile.open(sdist) as archive:
        members = [member.name for member in archive.getmembers() if member.isfile()]
    built = [name.partition("/")[2] for name in members]
    built = [name for name in built if not name.startswith(ADDED)]
    broken += differences(sdist, built, [name for name in files if not name.startswith(LEFT_OUT)])
    print("\n".join(broken) or "The wheel and the sdist have the files that git has.")
    return bool(broken)


def differences(path: Path, built: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Return a line for each file that is only in one of the two."""
    lacks = [f"{path} lacks {name}" for name in sorted({*wanted} - {*built})]
    return lacks + [
        f"{path} has {name}, which git has not" for name in sorted({*built} - {*wanted})
    ]


if __name__ == "__main__":
    sys.exit(main())
