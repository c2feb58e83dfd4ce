"""Write the golden files anew, after a change of recipes that is meant: `python -m tests.golden.regenerate`."""

import json
from pathlib import Path

from swa_dist import config

GOLDEN = Path(__file__).parent
JOBS = GOLDEN.parents[1] / "jobs"


def resolved() -> dict[str, str]:
    """Each shipped recipe by name, with everything that it leaves to defaults."""
    return {path.stem: config.to_yaml(config.load(path)) for path in sorted(JOBS.glob("*.yaml"))}


def schema() -> str:
    return json.dumps(config.schema(), indent=2, sort_keys=True) + "\n"


def main() -> None:
    recipes = resolved()
    folder = GOLDEN / "recipes"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.yaml"):
        if old.stem not in recipes:
            old.unlink()
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    (GOLDEN / "schema.json").write_text(schema(), encoding="utf-8")
    print(f"{folder}: {len(recipes)} recipes and the schema. Read `git diff` before you commit them.")


if __name__ == "__main__":
    main()
