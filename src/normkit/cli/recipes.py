"""The command ``recipes``, from a list beside this file, since loading the methods themselves takes torch and a second.

``python -m normkit.cli.recipes`` writes the list again after a recipe has changed; a test compares the two.
"""

import json
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import arg

from normkit._errors import nearest

LIST = Path(__file__).with_name("recipes.json")
WIDTH = 80  # columns of the terminal that the list is set for


@dataclass(frozen=True)
class Entry:
    """One recipe of the list, with the fields of ``normkit.recipes``."""

    name: str
    summary: str
    paper: str
    group: str
    ablation: bool


def listed() -> list[Entry]:
    """Return all recipes, in the order in which they are shown."""
    return [Entry(**values) for values in json.loads(LIST.read_text(encoding="utf-8"))]


def check_names(flag: str, methods: Iterable[str]) -> None:
    """Check the names of methods; their settings (``revisited:scale=0.2``) are checked later, with torch.

    Args:
        flag: The option that gave them.
        methods: The names.

    Raises:
        ValueError: One is unknown.
    """
    known = [entry.name for entry in listed()]
    for method in methods:
        name = method.partition(":")[0]
        if name not in known:
            raise ValueError(f"{flag}: unknown method {name!r}; {nearest(name, known)}")


def declared() -> list[Entry]:
    """Return all recipes as the methods declare them, which loads torch."""
    from normkit._apply import recipes

    return [Entry(r.name, r.summary, r.paper, r.group, r.ablation) for r in recipes().values()]


@dataclass(frozen=True)
class Recipes:
    """List the methods in groups, with their papers."""

    examples: ClassVar = ("normkit recipes", "normkit recipes --all --json")

    all: Annotated[bool, arg(help_behavior_hint="")] = False
    """List variants and arms of ablations too."""
    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print JSON."""

    def run(self, arguments: list[str]) -> int:
        """Print the list."""
        entries = [entry for entry in listed() if self.all or not entry.ablation]
        print(as_json(entries) if self.json else as_text(entries))
        if not (self.all or self.json):
            print("\n`normkit recipes --all` lists variants and arms of ablations too.")
        return 0


def as_json(entries: list[Entry]) -> str:
    """Return the entries as JSON."""
    return json.dumps([asdict(entry) for entry in entries], indent=1)


def as_text(entries: list[Entry]) -> str:
    """Return the entries in groups, each with its name, summary and paper."""
    width = max(len(entry.name) for entry in entries)
    lines = []
    for group in dict.fromkeys(entry.group for entry in entries):
        lines.append(f"\n{group}:")
        for entry in entries:
            if entry.group == group:
                texts = [row for text in (entry.summary, entry.paper) for row in textwrap.wrap(text, WIDTH - width - 4)]
                names = [entry.name, *[""] * (len(texts) - 1)]
                lines += [f"  {name:<{width}}  {text}" for name, text in zip(names, texts, strict=True)]
    return "\n".join(lines).strip()


if __name__ == "__main__":
    LIST.write_text(as_json(declared()) + "\n", encoding="utf-8")
