"""The commands that look into a training run: ``landscape``, ``doctor`` and ``reproduce how-bn-helps``."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

if TYPE_CHECKING:
    from normkit.study.landscape.records import LandscapeRecord


@dataclass(frozen=True)
class Landscape:
    """Train methods under the instruments: smoothness of the loss, covariate shift, stability of the activations."""

    data: str = "digits"
    """digits, spiral, a Hugging Face name, a local folder, or your own: FILE.py:factory, package.module:factory."""
    model: str = "digits-cnn"
    """A name such as vgg13-small, or your own: FILE.py:factory, package.module:factory."""
    methods: str = "none,batch,noisy-batch,none+noise,bnp,l1"
    """Comma-separated; see `normkit recipes`. none+noise is the noise of noisy-batch without normalization."""
    batch_size: int = 128
    """Examples per optimizer step."""
    steps: int = 200
    """Optimizer steps of each run."""
    every: int = 20
    """Steps from one measurement to the next; a measurement costs about as much as 15 steps."""
    lr: float = 0.1
    """Learning rate of all methods, and the unit of the walk along the gradient."""
    momentum: float = 0.0
    """Momentum; plain SGD is the paper's."""
    weight_decay: float = 0.0
    """Weight decay."""
    seed: int = 0
    """Seed of weights and data order, the same for all methods."""
    limit: int = 0
    """At most this many examples of each split; 0: all."""
    device: str = "cpu"
    """cpu, or a CUDA device."""
    out: Annotated[str, arg(metavar="FOLDER")] = "runs/landscape"
    """Output folder."""
    debug: bool = False
    """Show the traceback of an error."""

    def run(self, arguments: list[str]) -> int:
        """Train, measure and write the page."""
        from normkit.study.environment import command_line
        from normkit.study.landscape.records import LandscapeConfig
        from normkit.study.landscape.run import run_landscape

        Path(self.out).mkdir(parents=True, exist_ok=True)  # not after the runs
        config = LandscapeConfig(
            data=self.data,
            model=self.model,
            methods=tuple(word.strip() for word in self.methods.split(",") if word.strip()),
            batch_size=self.batch_size,
            steps=self.steps,
            every=self.every,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            seed=self.seed,
            limit=self.limit or None,
            device=self.device,
        )
        return _written(run_landscape(config, command=command_line(arguments), show=_say), self.out)


@dataclass(frozen=True)
class Doctor:
    """Name the sick normalization layers of a model, with the evidence and the remedy; exit code 1 if there are any."""

    data: str = "digits"
    """As in compare; batches of the training split are looked at."""
    model: str = "digits-cnn"
    """As in compare."""
    method: str = "batch"
    """The recipe it was trained with; see `normkit recipes`."""
    checkpoint: Annotated[str, arg(metavar="FILE")] = ""
    """State dict by torch.save, bare or under model or state_dict; empty: the model as it is built."""
    batch_size: int = 64
    """Batch size in training."""
    accumulate: int = 1
    """Micro-batches per optimizer step in training."""
    weight_decay: float = 0.0
    """Weight decay in training."""
    limit: int = 0
    """At most this many examples; 0: all."""
    device: str = "cpu"
    """cpu, or a CUDA device."""
    json: bool = False
    """Print JSON."""
    debug: bool = False
    """Show the traceback of an error."""

    def run(self, arguments: list[str]) -> int:
        """Print the diagnosis."""
        from normkit.study.doctor import DoctorConfig, run_doctor

        found = run_doctor(
            DoctorConfig(
                data=self.data,
                model=self.model,
                method=self.method,
                checkpoint=Path(self.checkpoint) if self.checkpoint else None,
                batch_size=self.batch_size,
                accumulate=self.accumulate,
                weight_decay=self.weight_decay,
                limit=self.limit or None,
                device=self.device,
            )
        )
        print(json.dumps(found.to_dict(), indent=2, allow_nan=False) if self.json else found)
        return 0 if found.healthy else 1


@dataclass(frozen=True)
class ReproduceHowBNHelps:
    """The experiments of "How does batch normalization help optimization?" (arXiv 1805.11604), its findings judged."""

    model: Literal["vgg", "dln"] = "vgg"
    """vgg on CIFAR-10, or dln, the deep linear network."""
    data: str = "cifar10"
    """CIFAR-10, a Hugging Face name or a local folder; for the VGG."""
    scale: float = 0.01
    """Share of the paper's number of steps (15,000 and 10,000)."""
    width: Literal["full", "small"] = "small"
    """full, or a VGG a quarter as wide."""
    seed: int = 0
    """Seed of weights and data."""
    device: str = "cpu"
    """cpu, or a CUDA device."""
    out: Annotated[str, arg(metavar="FOLDER")] = "runs/how-bn-helps"
    """Output folder."""
    debug: bool = False
    """Show the traceback of an error."""

    def run(self, arguments: list[str]) -> int:
        """Run the experiment and write the page."""
        from normkit.study.environment import command_line
        from normkit.study.papers.how_bn_helps import HowBNHelps, reproduce

        Path(self.out).mkdir(parents=True, exist_ok=True)
        config = HowBNHelps(self.model, self.data, self.scale, self.width, self.seed, self.device)
        return _written(reproduce(config, command=command_line(arguments), show=_say), self.out)


def _written(record: "LandscapeRecord", folder: str) -> int:
    from normkit.study.report.landscape import write_landscape

    page, text, _ = write_landscape(record, Path(folder))
    print(text.read_text(encoding="utf-8").split("## How to get this again")[0])
    print(f"report: {page}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)
