"""The command ``reproduce``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from normkit.cli.study import stopped, words


@dataclass(frozen=True)
class Reproduce:
    """Run a table or figure of one of the papers, at full size or scaled down; without a name, list them with their cost."""

    preset: Annotated[str, Positional, arg(metavar="PRESET")] = ""
    """Name of a preset."""
    scale: float = 0.01
    """Share of the paper's training budget, in (0, 1]; the report says what was scaled down."""
    data: str = ""
    """Use this data instead, for example a local copy of the preset's."""
    model: str = ""
    """Only this network of the preset, or in place of its only one, for example resnet20."""
    methods: str = ""
    """Only these methods, comma-separated."""
    paper_rates: bool = False
    """Train at the paper's learning rates instead of searching for every method's own."""
    seeds: int = 0
    """Final runs per method; 0: as many as the preset has at this scale."""
    limit: int = 0
    """At most this many examples of each split; 0: as the scale says."""
    device: str = "cpu"
    """cpu, or a CUDA device."""
    out: Annotated[str, arg(metavar="FOLDER")] = ""
    """Output folder. Empty: runs/ and the preset's name and scale."""
    workers: int = 0
    """Trials side by side; 0: one per core, one on a GPU."""
    quiet: bool = False
    """Print nothing but the result."""
    debug: bool = False
    """Show the traceback of an error."""

    def run(self, arguments: list[str]) -> int:
        """Run the preset."""
        from normkit.study.papers.reproduce import listing, reproduce

        if not self.preset:
            print(listing())
            return 0
        given: dict[str, Any] = {
            "data": self.data,
            "methods": words(self.methods),
            "seeds": self.seeds,
            "limit": self.limit,
            "device": self.device,
        }
        out = Path(self.out) if self.out else Path("runs") / self._name
        changes = {name: value for name, value in given.items() if value and (name, value) != ("device", "cpu")}
        try:
            page = reproduce(
                self.preset,
                scale=self.scale,
                out=out,
                changes=changes,
                model=self.model or None,
                paper_rates=self.paper_rates,
                workers=self.workers or None,
                quiet=self.quiet,
                arguments=arguments,
            )
        except KeyboardInterrupt:
            return stopped()
        print(page)
        print(f"written: {out / 'reproduce.md'}")
        return 0

    @property
    def _name(self) -> str:
        """Name of the output folder: what decides whether two commands mean the same study, the small changes left out."""
        parts = (self.preset, self.model, "paper-rates" if self.paper_rates else "", f"{self.scale:g}")
        return "".join(c if c.isalnum() or c == "." else "-" for c in "-".join(filter(None, parts)))
