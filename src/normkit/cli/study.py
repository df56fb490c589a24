"""The commands of the main job: ``compare``, ``worker`` and ``report``."""

import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import OmitArgPrefixes, Positional, arg

from normkit.cli.recipes import check_names
from normkit.cli.stop import stopped
from normkit.study.config import Comparison, Flag, Loading, Selection, StudyConfig, Training

RESUME = "nothing is lost: the same command resumes"


@dataclass(frozen=True)
class Execution:
    """Where and how the trials run, and what is printed.

    Attributes:
        workers: Trials side by side; 0: one per core, one on a GPU.
        storage: Any Optuna storage, to share the work with other processes; by default a SQLite file in the output folder.
        track: Experiment trackers that get every trial: tensorboard, wandb, mlflow, trackio.
        landscape: Train every method once more under the instruments, and add loss band, beta, covariate shift and so on to
            the report.
        retry_failed: Run trials that were closed as failed again, for example once their cause is removed.
        quiet: Print nothing but the result.
    """

    workers: Annotated[int, arg(metavar="COUNT")] = 0
    storage: Annotated[str | None, arg(metavar="URL", help_behavior_hint="")] = None
    track: Annotated[tuple[str, ...], arg(metavar="TRACKER,...", help_behavior_hint="")] = ()
    landscape: Flag = False
    retry_failed: Flag = False
    quiet: Flag = False


@dataclass(frozen=True)
class Compare(Comparison):
    """Compare methods fairly on one model and data, and write a report."""

    examples: ClassVar = (
        "normkit compare",
        "normkit compare --methods batch,group,bnp --batch-sizes 64,8,1 --dry-run",
        "normkit compare --data PATH/TO/cifar10 --model resnet20 --budget 50000",
        "normkit compare --data mine.py:data --model mine.py:model",
    )

    out: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Output folder, where the same command resumes; by default runs/ and the study's name."""
    dry_run: Flag = False
    """Print what would run, how many trials, about how long and where to, and stop."""
    thorough: Flag = False
    """Run the full comparison: ten methods, five batch sizes, five seeds, 20,000 samples a run; takes hours."""
    selection: OmitArgPrefixes[Selection] = field(default_factory=Selection)
    loading: OmitArgPrefixes[Loading] = field(default_factory=Loading)
    training: OmitArgPrefixes[Training] = field(default_factory=Training)
    execution: OmitArgPrefixes[Execution] = field(default_factory=Execution)

    @property
    def study(self) -> StudyConfig:
        """The configuration that the options make."""
        own = {option.name: getattr(self, option.name) for option in fields(Comparison)}
        return StudyConfig(**own, **vars(self.selection), **vars(self.loading), **vars(self.training))

    @property
    def quiet(self) -> bool:
        """Whether to print nothing but the result."""
        return self.execution.quiet

    def run(self, arguments: list[str]) -> int:
        """Run the study."""
        from normkit.study.plan import validate_options

        study, how = self.study, self.execution
        validate_options(study)
        check_names("--methods", study.methods)  # these two without torch, and so at once
        if sys.stdout.isatty() and not how.quiet:
            print("loading ...", flush=True)  # torch takes a second or more
        from normkit.study.compare import assist, compare, preview
        from normkit.study.environment import command_line
        from normkit.study.store.torchrun import launched_rank

        if launched_rank():  # rank 0 does what a single process does, the others help it train
            assist(study, self.out)
            return 0
        if self.dry_run:
            print(preview(study, self.out, workers=how.workers))
            return 0
        try:
            record, folder = compare(
                study,
                self.out,
                storage=how.storage,
                workers=how.workers,
                quiet=how.quiet,
                landscape=how.landscape,
                track=how.track,
                retry_failed=how.retry_failed,
                command=command_line(arguments),
            )
        except KeyboardInterrupt as stop:
            return stopped(stop, RESUME)
        _print_report(record, folder)
        return exit_code(record)


THOROUGH = Compare(
    methods=(
        *("none", "batch", "group", "layer", "batch-renorm"),
        *("bnp", "group+bnp", "batchless", "sgd-g", "revisited"),
    ),
    batch_sizes=(128, 32, 8, 2, 1),
    budget=20_000,
    seeds=5,
    selection=Selection(lr_points=6, search_seeds=2),
    thorough=True,
)


@dataclass(frozen=True)
class Worker:
    """Run trials of shared studies until none are left."""

    examples: ClassVar = (
        "normkit worker --storage postgresql+psycopg2://host/studies",
        "normkit worker --study cifar10-resnet20-1a2b3c4d --workers 4",
    )

    storage: Annotated[str | None, arg(metavar="URL", help_behavior_hint="")] = None
    """The storage that `normkit compare --storage` was given; by default the variable NORMKIT_STORAGE."""
    study: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Name of one study; by default all that have work."""
    workers: Annotated[int, arg(metavar="COUNT")] = 0
    """Trials side by side; 0: one per core, one on a machine with a GPU."""
    checkpoints: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Folder of checkpoints; machines that share it resume each other's interrupted trials."""
    quiet: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print nothing but the result."""

    def run(self, arguments: list[str]) -> int:
        """Join the studies.

        Raises:
            ValueError: No storage is given, or no folder for checkpoints.
        """
        import torch

        from normkit.study.check import check
        from normkit.study.compare import available_cores, check_workers
        from normkit.study.data.images import cache_folder
        from normkit.study.folder import STORAGE_VARIABLE
        from normkit.study.report.format import pluralize
        from normkit.study.store.join_studies import join

        url = self.storage or os.environ.get(STORAGE_VARIABLE, "")
        if not url:
            raise ValueError(f"--storage is empty; give the URL of a storage, or set {STORAGE_VARIABLE}")
        check_workers(self.workers)
        checkpoints = self.checkpoints or cache_folder() / "checkpoints"
        if checkpoints.exists() and not checkpoints.is_dir():
            raise ValueError(f"--checkpoints {checkpoints}: is no folder; give one, it is made when it is needed")
        count = self.workers or (1 if torch.cuda.is_available() else available_cores())
        try:
            done = join(url, self.study, count, checkpoints, check)
        except KeyboardInterrupt as stop:
            return stopped(stop, "nothing is lost: other workers take over the running trials")
        print(f"nothing is left to do (worked on {pluralize(done, 'study', 'studies')})")
        return 0


@dataclass(frozen=True)
class Report:
    """Make the report of a study again, also of an unfinished one."""

    examples: ClassVar = ("normkit report runs/digits",)

    run_folder: Annotated[Path, Positional, arg(metavar="RUN")]
    """Folder that `normkit compare` wrote."""
    storage: Annotated[str | None, arg(metavar="URL", help_behavior_hint="")] = None
    """Storage of the study, if it needs a password."""

    def run(self, arguments: list[str]) -> int:
        """Write the report.

        Raises:
            ValueError: The trials are gone.
        """
        from normkit.study.compare import report
        from normkit.study.environment import redact
        from normkit.study.folder import StudyFolder

        folder = StudyFolder.read(self.run_folder, resume=False)
        address = folder.address(self.storage)
        store = address.store()
        if not store.exists():
            raise ValueError(
                f"{redact(address.url)} does not hold the trials of {self.run_folder} (any more): the report stays as it is"
            )
        _print_report(report(folder, store), folder.path)
        return 0


def exit_code(*records: Any) -> int:
    """Return 0 if a final run of the studies came to an end, else 1 after a line that says why none did."""
    finals = [trial for record in records for trial in record.trials if trial.key.phase == "final"]
    if not finals or any(trial.state != "failed" for trial in finals):
        return 0
    print(f"error: every final run failed, the first with: {finals[0].error}"[:299], file=sys.stderr)
    return 1


def _print_report(record: Any, folder: Path) -> None:
    from rich.console import Console

    from normkit.study.report.terminal import render_terminal

    Console().print(render_terminal(record))
    print(f"\nreport: {folder / 'report.html'}")
