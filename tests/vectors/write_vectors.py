"""Write every vector file beside this one; what is no longer made is removed."""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def main() -> None:
    sys.path.insert(0, str(FOLDER))
    from vector_files import files

    made = files()
    for stale in {path.name for path in FOLDER.glob("*.json")} - made.keys():
        (FOLDER / stale).unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"{name}: {len(text):,} bytes")


if __name__ == "__main__":
    main()
