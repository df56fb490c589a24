"""``--track``: every trial that ends goes to an experiment tracker, through the tracker's own client.

None of them is required; a tracker that fails in the middle of a study ends its own part and not the study.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from normkit._errors import nearest
from normkit.study.errors import StudyError
from normkit.study.records import TrialResult

logger = logging.getLogger(__name__)

Send = Callable[[str, dict[str, Any], list[tuple[int, dict[str, float]]], dict[str, float]], None]


def tensorboard(client: ModuleType, folder: Path, project: str) -> Send:
    """One event file per run in ``folder/tensorboard``; what ``tracker`` needs of TensorBoard."""

    def send(run: str, key: dict[str, Any], curve: list[tuple[int, dict[str, float]]], end: dict[str, float]) -> None:
        with client.SummaryWriter(str(folder / "tensorboard" / run)) as board:
            for examples, values in curve:
                for name, value in values.items():
                    board.add_scalar(name, value, examples)
            for name, value in end.items():
                board.add_scalar(f"end/{name}", value, curve[-1][0] if curve else 0)

    return send


def wandb(client: ModuleType, folder: Path, project: str) -> Send:
    """One run per trial in the project named after the study; Trackio's client has the same face."""

    def send(run: str, key: dict[str, Any], curve: list[tuple[int, dict[str, float]]], end: dict[str, float]) -> None:
        client.init(project=project, name=run, config=key)
        for examples, values in curve:
            client.log({"examples": examples, **values})
        client.log({f"end/{name}": value for name, value in end.items()})
        client.finish()

    return send


def mlflow(client: ModuleType, folder: Path, project: str) -> Send:
    """One run per trial in the experiment named after the study."""

    def send(run: str, key: dict[str, Any], curve: list[tuple[int, dict[str, float]]], end: dict[str, float]) -> None:
        client.set_experiment(project)
        with client.start_run(run_name=run):
            client.log_params(key)
            for examples, values in curve:
                client.log_metrics(values, step=examples)
            client.log_metrics({f"end/{name}": value for name, value in end.items()})

    return send


# name -> module of the client, what to install, adapter
TRACKERS: dict[str, tuple[str, str, Callable[[ModuleType, Path, str], Send]]] = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard", tensorboard),
    "wandb": ("wandb", "wandb", wandb),
    "trackio": ("trackio", "trackio", wandb),
    "mlflow": ("mlflow", "mlflow", mlflow),
}


class Tracker:
    """Sends each result once, also over restarts of the study: ``tracked-NAME.txt`` lists what was sent.

    Args:
        name: One of ``TRACKERS``.
        folder: Output folder of the study.
        project: Name of the study.
        column: What scores are called, see ``normkit.study.records.Metric.column``.

    Raises:
        StudyError: There is no such tracker, or its client is not installed.
    """

    def __init__(self, name: str, folder: Path, project: str, column: str = "accuracy") -> None:
        if name not in TRACKERS:
            raise StudyError(f"--track: unknown tracker {name!r}; {nearest(name, TRACKERS)}")
        module, package, adapter = TRACKERS[name]
        try:
            client = __import__(module, fromlist=["_"])
        except ImportError as error:
            raise StudyError(f"--track {name}: {error}; pip install {package}") from error
        self.name = name
        self._column = column
        self._send: Send | None = adapter(client, folder, project)
        self._file = folder / f"tracked-{name}.txt"
        self._sent = set(self._file.read_text(encoding="utf-8").splitlines()) if self._file.exists() else set()

    def update(self, results: list[TrialResult]) -> None:
        """Send what has ended since the last call."""
        for result in results:
            key = result.key
            run = f"{key.phase}-{key.method.replace(':', '-')}-batch{key.batch_size}-lr{key.lr:g}-seed{key.seed}"
            if run in self._sent or self._send is None:
                continue
            try:
                self._send(run, {**asdict(key), "state": result.state}, *_values(result, self._column))
            except Exception as error:  # the tracker's server may be away: that must not end the study
                logger.warning("--track %s stopped: %s: %s", self.name, type(error).__name__, error)
                self._send = None
                return
            self._sent.add(run)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(run + "\n")


def _values(result: TrialResult, column: str) -> tuple[list[tuple[int, dict[str, float]]], dict[str, float]]:
    """The curve and the figures at the end, without what is missing."""
    known = result.to_dict(column)
    names = ("train_loss", f"validation_{column}")
    curve = [(point["examples"], _known(point, names)) for point in known["curve"]]
    ends = (f"validation_{column}", "validation_loss", f"test_{column}", "test_loss", "seconds")
    return curve, _known(known, ends)


def _known(values: dict[str, Any], names: Sequence[str]) -> dict[str, float]:
    return {name: values[name] for name in names if values[name] is not None}
