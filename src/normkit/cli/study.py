"""The commands of the main job: ``compare``, ``worker``, ``report`` and ``recipes``."""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tyro.conf import OmitArgPrefixes, Positional, arg

from normkit._apply import recipes
from normkit.study.config import Training


@dataclass(frozen=True)
class Compare:
    """Compare methods fairly on one model and data, and write a report."""

    data: str = "digits"
    """digits, spiral, a Hugging Face name, a local folder, or your own: FILE.py:factory, package.module:factory."""
    model: str = "digits-cnn"
    """A name such as resnet20, or your own: FILE.py:factory, package.module:factory."""
    methods: str = "none,batch,group,bnp,batchless-projected"
    """Comma-separated; see `normkit recipes`."""
    batch_sizes: str = "64,8,1"
    """Examples per optimizer step, comma-separated."""
    seeds: int = 3
    """Final runs per method and batch size."""
    budget: int = 1500
    """Training examples a run sees."""
    lr: str = "auto"
    """auto (searched for every method and batch size), one learning rate for all, or one for each: batch=0.1,sgd-g=0.2."""
    lr_points: int = 5
    """Grid points of the learning-rate search, a factor sqrt(10) apart."""
    search_seeds: int = 1
    """Runs per grid point."""
    validation: float = 0.2
    """Share of the training data that validates, or from 1 up the number of examples."""
    best_weights: bool = False
    """Judge the weights with the best validation accuracy of a run, looked for after every epoch, instead of the last."""
    training: OmitArgPrefixes[Training] = field(default_factory=Training)
    image_column: str = ""
    """Column with the images; empty: found by its type."""
    label_column: str = ""
    """Column with the classes; empty: found by its type."""
    image_size: int = 0
    """Bring images to this height and width; 0: as they are."""
    limit: int = 0
    """At most this many examples of each split; 0: all."""
    landscape: bool = False
    """Train every method once more under the instruments, and add loss band, beta, covariate shift and so on to the report."""
    prune: bool = False
    """Give up search runs that are below the median of the other learning rates at the same point."""
    alternative: Literal["two-sided", "greater"] = "two-sided"
    """Alternative hypothesis of the paired test."""
    device: str = "cpu"
    """cpu, or a CUDA device."""
    out: Annotated[str, arg(metavar="FOLDER")] = ""
    """Output folder; the same command goes on there where it was. Empty: runs/ and the study's name."""
    storage: Annotated[str, arg(metavar="URL")] = ""
    """Any Optuna storage, to share the work with other processes. Empty: a SQLite file in the output folder."""
    track: str = ""
    """Experiment trackers that get every trial, comma-separated: tensorboard, wandb, mlflow, trackio."""
    workers: int = 0
    """Trials side by side; 0: one per core, one on a GPU."""
    thorough: bool = False
    """The full comparison: ten methods, five batch sizes, five seeds, 20,000 examples a run; takes hours."""
    quiet: bool = False
    """Print nothing but the result."""
    debug: bool = False
    """Show the traceback of an error."""

    def run(self, arguments: list[str]) -> int:
        """Run the study."""
        from normkit.study.compare import assist, compare
        from normkit.study.config import StudyConfig
        from normkit.study.store.torchrun import launched_rank

        config = StudyConfig(
            data=self.data,
            model=self.model,
            methods=words(self.methods),
            batch_sizes=tuple(_number(int, "--batch-sizes", word) for word in words(self.batch_sizes)),
            seeds=self.seeds,
            budget=self.budget,
            lr=_rates(self.lr),
            lr_points=self.lr_points,
            search_seeds=self.search_seeds,
            validation=self.validation,
            best_weights=self.best_weights,
            **asdict(self.training),
            image_column=self.image_column or None,
            label_column=self.label_column or None,
            image_size=self.image_size or None,
            limit=self.limit or None,
            prune=self.prune,
            alternative=self.alternative,
            device=self.device,
        )
        out = Path(self.out) if self.out else None
        if launched_rank():  # rank 0 does what a single process does, the others help it train
            assist(config, out)
            return 0
        try:
            record, folder = compare(
                config,
                out,
                storage=self.storage or None,
                workers=self.workers or None,
                quiet=self.quiet,
                landscape=self.landscape,
                track=words(self.track),
                arguments=arguments,
            )
        except KeyboardInterrupt:
            return stopped()
        _show(record, folder)
        return 0


THOROUGH = Compare(
    methods="none,batch,group,layer,batch-renorm,bnp,batchless,batchless-projected,sgd-g,revisited",
    batch_sizes="128,32,8,2,1",
    seeds=5,
    budget=20_000,
    lr_points=6,
    search_seeds=2,
    thorough=True,
)


@dataclass(frozen=True)
class Worker:
    """Work on the studies in a storage, together with any number of other workers, until nothing is left."""

    storage: Annotated[str, arg(metavar="URL")] = ""
    """The storage that `normkit compare --storage` was given; or in the variable NORMKIT_STORAGE."""
    study: str = ""
    """Name of one study; empty: all that have work."""
    workers: int = 0
    """Trials side by side; 0: one per core, one on a machine with a GPU."""
    checkpoints: Annotated[str, arg(metavar="FOLDER")] = ""
    """Where interrupted trials go on from; a folder that machines share lets one go on for another."""
    debug: bool = False
    """Show the traceback of an error."""

    def run(self, arguments: list[str]) -> int:
        """Join the studies.

        Raises:
            ValueError: No storage is given.
        """
        from normkit.study.check import check
        from normkit.study.compare import available_cores, check_workers
        from normkit.study.data.images import cache_folder
        from normkit.study.folder import STORAGE_VARIABLE
        from normkit.study.store.join_studies import join

        url = self.storage or os.environ.get(STORAGE_VARIABLE, "")
        if not url:
            raise ValueError(f"--storage is empty; give the URL of a storage, or set {STORAGE_VARIABLE}")
        check_workers(self.workers)
        count = self.workers or (1 if torch.cuda.is_available() else available_cores())
        folder = Path(self.checkpoints) if self.checkpoints else cache_folder() / "checkpoints"
        try:
            done = join(url, self.study or None, count, folder, check, lambda line: print(line, flush=True))
        except KeyboardInterrupt:
            print("\nstopped; nothing is lost: other workers take over what was running", file=sys.stderr)
            return 130
        print(f"nothing is left to do ({done} {'study' if done == 1 else 'studies'} worked on)")
        return 0


@dataclass(frozen=True)
class Report:
    """Make the report of a study again, also of an unfinished one."""

    run_folder: Annotated[Path, Positional, arg(metavar="RUN")]
    """Folder that `normkit compare` wrote."""
    storage: Annotated[str, arg(metavar="URL")] = ""
    """Storage of the study, if it needs a password."""
    debug: bool = False
    """Show the traceback of an error."""

    def run(self, arguments: list[str]) -> int:
        """Write the report.

        Raises:
            ValueError: The trials are gone.
        """
        from normkit.study.compare import report
        from normkit.study.environment import redact
        from normkit.study.folder import StudyFolder

        folder = StudyFolder.read(self.run_folder)
        place = folder.place(self.storage or None)
        store = place.store()
        if not store.exists():
            raise ValueError(
                f"{redact(place.url)} does not hold the trials of {self.run_folder} (any more): the report stays as it is"
            )
        store.open(folder.config)
        _show(report(folder, store), folder.path)
        return 0


@dataclass(frozen=True)
class Recipes:
    """List the methods, with their papers."""

    debug: bool = False
    """Show the traceback of an error."""

    def run(self, arguments: list[str]) -> int:
        """Print the list."""
        width = max(map(len, recipes()))
        for name, recipe in recipes().items():
            print(f"{name:<{width}}  {recipe.summary}\n{'':<{width}}  {recipe.paper}")
        return 0


def stopped() -> int:
    """Say that a study was stopped with Ctrl-C; returns the exit code."""
    print("\nstopped; nothing is lost: the same command goes on where it was", file=sys.stderr)
    return 130


def _show(record: Any, folder: Path) -> None:
    from rich.console import Console

    from normkit.study.report.terminal import render_terminal

    Console().print(render_terminal(record))
    print(f"\nreport: {folder / 'report.html'}")


def words(text: str) -> tuple[str, ...]:
    """The comma-separated words of an argument."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _rates(text: str) -> Any:
    """What ``--lr`` means: ``auto``, a number, or a number for each method."""
    if text == "auto":
        return "auto"
    if "=" not in text:
        return _number(float, "--lr", text)
    return {name: _number(float, "--lr", rate) for name, _, rate in (word.partition("=") for word in words(text))}


def _number(kind: Callable[[str], Any], flag: str, word: str) -> Any:
    try:
        return kind(word)
    except ValueError:
        raise ValueError(f"{flag}: {word!r} is not a {'whole ' if kind is int else ''}number") from None
