"""Write every vector file beside this one; what is no longer made is removed, what people have written stays."""

from __future__ import annotations

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def main() -> None:
    sys.path.insert(0, str(FOLDER))
    from vector_files import files

    made = files()
    for path in FOLDER.glob("*.json"):
        is_made = "made_by" in json.loads(path.read_text(encoding="utf-8"))
        if is_made and path.name not in made:
            path.unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"{name}: {len(text):,} bytes")


if __name__ == "__main__":
    main()
