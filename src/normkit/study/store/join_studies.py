"""Joining studies that wait in a storage: ``normkit worker``, on any number of machines."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import optuna

from normkit._errors import nearest
from normkit.study.config import StudyConfig
from normkit.study.environment import environment, redact, together
from normkit.study.errors import StudyError
from normkit.study.plan import Slot, slots
from normkit.study.records import TrialResult
from normkit.study.store.fingerprint import check_fingerprint
from normkit.study.store.store import Store
from normkit.study.store.worker import StoreAddress, lock_file, run_workers
from normkit.study.task import Task

logger = logging.getLogger(__name__)


def waiting_studies(url: str) -> dict[str, StudyConfig]:
    """Studies in a storage that have not ended, by name.

    Raises:
        StudyError: The storage cannot be opened.
    """
    found: dict[str, StudyConfig] = {}
    lock = lock_file(url)
    for summary in optuna.get_all_study_summaries(Store(url, "", lock).storage):
        if "config" in summary.user_attrs:
            config = StudyConfig.from_dict(json.loads(summary.user_attrs["config"]))
            if len(Store(url, summary.study_name, lock).results()) < len(slots(config)):
                found[summary.study_name] = config
    return found


def join(
    url: str,
    study: str | None,
    count: int,
    checkpoints: Path,
    check: Callable[[StudyConfig], Task],
) -> int:
    """Work on the studies of a storage until none has work left.

    Args:
        url: The storage.
        study: Name of one study, or None for all.
        count: Worker processes on this machine.
        checkpoints: Folder of checkpoints; if machines share it, they resume each other's trials.
        check: Loads what a study needs and raises where this machine cannot run it.

    Returns:
        Number of studies worked on.

    Raises:
        StudyError: There is no study, or none of that name, or this machine cannot run it.
    """
    waiting = waiting_studies(url)
    known = optuna.get_all_study_names(Store(url, "", lock_file(url)).storage)
    if not known:
        raise StudyError(
            f"--storage {redact(url)}: holds no study; give what `normkit compare --storage` was given, after it began"
        )
    if study is not None:
        if study not in known:
            raise StudyError(f"--study {study}: the storage has no such study; {nearest(study, known)}")
        waiting = {name: config for name, config in waiting.items() if name == study}
    for name, config in waiting.items():
        task = check(config)
        address = StoreAddress(url, name, lock_file(url), checkpoints)
        store = address.store()
        check_fingerprint(store, config, task)
        store.set_attr("environment", together(store.get_attr("environment"), environment(config.device)))
        ended = 0

        def on_progress(
            results: list[TrialResult], _: list[Slot], name: str = name, config: StudyConfig = config
        ) -> None:
            nonlocal ended
            if len(results) > ended:
                ended = len(results)
                logger.info("%s: %d of %d trials have ended", name, ended, len(slots(config)))

        run_workers(address, config, count, on_progress)
    return len(waiting)
