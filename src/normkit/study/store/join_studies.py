"""Joining studies that wait in a storage: ``normkit worker``, on any number of machines."""

import logging
from collections.abc import Callable
from pathlib import Path

import optuna

from normkit._errors import nearest
from normkit.study.config import StudyConfig
from normkit.study.environment import environment, redact, texts, together
from normkit.study.errors import StudyError
from normkit.study.identity import unpack
from normkit.study.plan import Slot, slots, validate
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
    for name in known_studies(url):
        try:
            store = Store(url, name, lock)
            kept = store.get_attr("config")
            if kept is None:
                continue  # another program's
            config = unpack(kept, f"study {name}")
            validate(config)
            store.config = config
            if not store.has_ended():
                found[name] = config
        except (StudyError, TypeError) as error:
            logger.warning("skipped study %s: %s", name, error)
    return found


def known_studies(url: str) -> list[str]:
    """Names of all studies in a storage, another program's too.

    Raises:
        StudyError: The storage cannot be opened.
    """
    return optuna.get_all_study_names(Store(url, "", lock_file(url)).storage)


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
    known = known_studies(url)
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
        store.set_attr("environment", together(store.get_attr("environment", texts), environment(config.device)))
        ended = 0

        def on_progress(
            results: list[TrialResult], _: list[Slot], name: str = name, config: StudyConfig = config
        ) -> None:
            nonlocal ended
            if len(results) > ended:
                ended = len(results)
                logger.info("%s: %d of %d trials have ended", name, ended, len(slots(config, results)))

        run_workers(address, config, count, on_progress)
    return len(waiting)
