"""The command ``reproduce``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import Positional, arg

from normkit.cli.stop import stopped
from normkit.cli.study import RESUME, exit_code


@dataclass(frozen=True)
class Reproduce:
    """Run a table or figure of one of the papers, at full size or scaled down.

    Without a name, the presets are listed with their cost.
    """

    examples: ClassVar = (
        "normkit reproduce",
        "normkit reproduce bnp-mlp --scale 0.01",
    )

    preset: Annotated[str, Positional, arg(metavar="PRESET")] = ""
    """Name of a preset."""
    scale: Annotated[float, arg(metavar="FRACTION")] = 0.01
    """Fraction of the paper's training budget, in (0, 1]; the report says what was scaled down."""
    data: Annotated[str | None, arg(metavar="DATA", help_behavior_hint="")] = None
    """Use this data instead, for example a local copy of the preset's."""
    train_split: Annotated[str | None, arg(metavar="SPLIT", help_behavior_hint="")] = None
    """Train on this split instead, or on several joined by +, where your copy of the data has other ones."""
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """Only this network of the preset, or in place of its only one, for example resnet20."""
    methods: Annotated[tuple[str, ...], arg(metavar="METHOD,...", help_behavior_hint="")] = ()
    """Only these methods."""
    paper_rates: Annotated[bool, arg(help_behavior_hint="")] = False
    """Train at the paper's learning rates instead of searching for every method's own."""
    seeds: Annotated[int | None, arg(metavar="COUNT", help_behavior_hint="")] = None
    """Final runs per method; by default as many as the preset has at this scale."""
    limit: Annotated[int | None, arg(metavar="COUNT", help_behavior_hint="")] = None
    """Use at most this many samples of each split; by default as the scale says."""
    device: Annotated[str | None, arg(metavar="DEVICE", help_behavior_hint="")] = None
    """cpu, or a CUDA device; by default cpu."""
    out: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Output folder; by default runs/ and the preset's name and scale."""
    workers: Annotated[int, arg(metavar="COUNT")] = 0
    """Trials side by side; 0: one per core, one on a GPU."""
    quiet: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print nothing but the result."""

    def run(self, arguments: list[str]) -> int:
        """Run the preset."""
        from normkit.study.papers.reproduce import preset_list, reproduce

        if not self.preset:
            print(preset_list())
            return 0
        out = self.out or Path("runs") / self._name
        changes: dict[str, Any] = {
            name: value
            for name in ("data", "train_split", "methods", "seeds", "limit", "device")
            if (value := getattr(self, name)) not in (None, ())
        }
        try:
            page, records = reproduce(
                self.preset,
                scale=self.scale,
                out=out,
                changes=changes,
                model=self.model,
                paper_rates=self.paper_rates,
                workers=self.workers,
                quiet=self.quiet,
                arguments=arguments,
            )
        except KeyboardInterrupt as stop:
            return stopped(stop, RESUME)
        print(page)
        print(f"written: {out / 'reproduce.md'}")
        return exit_code(*records)

    @property
    def _name(self) -> str:
        """Name of the output folder, from what decides whether two commands mean the same study."""
        parts = (self.preset, self.model, "paper-rates" if self.paper_rates else "", f"{self.scale:g}")
        return "".join(c if c.isalnum() or c == "." else "-" for c in "-".join(filter(None, parts)))
