"""The commands that look into a training run: ``landscape``, ``doctor`` and ``reproduce how-bn-helps``."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import OmitArgPrefixes, arg

from normkit.cli.recipes import check_names
from normkit.study.config import DoctorConfig, HowBNHelps, LandscapeConfig
from normkit.study.files import new_folder

if TYPE_CHECKING:
    from normkit.study.landscape.records import LandscapeRecord


@dataclass(frozen=True)
class Landscape:
    """Train methods under instruments: loss smoothness, covariate shift, activations."""

    examples: ClassVar = (
        "normkit landscape --methods none,batch,bnp --steps 100",
        "normkit landscape --model vgg13-small --data PATH/TO/cifar10",
    )

    config: OmitArgPrefixes[LandscapeConfig] = field(default_factory=LandscapeConfig)
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("runs/landscape")
    """Output folder."""

    def run(self, arguments: list[str]) -> int:
        """Train, measure and write the page."""
        from normkit.study.environment import command_line
        from normkit.study.landscape.run import run_landscape

        with new_folder(self.out):  # not after the runs
            return _written(run_landscape(self.config, command=command_line(arguments)), self.out)


@dataclass(frozen=True)
class Doctor:
    """Find the faulty normalization layers of a model, with evidence and remedies.

    The exit code is 1 if there are any.
    """

    examples: ClassVar = (
        "normkit doctor --model mine.py:model --data mine.py:data --batch-size 2",
        "normkit doctor --model resnet20 --data PATH/TO/cifar10 --checkpoint net.pt",
    )

    quiet: ClassVar[bool] = True  # what apply logs is no part of the diagnosis
    config: OmitArgPrefixes[DoctorConfig] = field(default_factory=DoctorConfig)
    json: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print JSON."""

    def run(self, arguments: list[str]) -> int:
        """Print the diagnosis."""
        check_names("--method", [self.config.method])
        from normkit.study.doctor import run_doctor

        found = run_doctor(self.config)
        print(json.dumps(found.to_dict(), indent=2, allow_nan=False) if self.json else found)
        return 0 if found.healthy else 1


@dataclass(frozen=True)
class ReproduceHowBNHelps:
    """Repeat the experiments of "How does batch normalization help optimization?".

    The paper is arXiv 1805.11604. The report judges each of its findings.
    """

    examples: ClassVar = (
        "normkit reproduce how-bn-helps --data PATH/TO/cifar10",
        "normkit reproduce how-bn-helps --model dln --scale 0.1",
    )

    config: OmitArgPrefixes[HowBNHelps] = field(default_factory=HowBNHelps)
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("runs/how-bn-helps")
    """Output folder."""

    def run(self, arguments: list[str]) -> int:
        """Run the experiment and write the page."""
        from normkit.study.environment import command_line
        from normkit.study.papers.how_bn_helps import reproduce

        with new_folder(self.out):
            return _written(reproduce(self.config, command=command_line(arguments)), self.out)


def _written(record: "LandscapeRecord", folder: Path) -> int:
    from normkit.study.report.landscape import write_landscape

    page, text, _ = write_landscape(record, folder)
    print(text.read_text(encoding="utf-8").split("## How to get this again")[0])
    print(f"report: {page}")
    return 0
