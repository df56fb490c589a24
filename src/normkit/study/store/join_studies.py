"""Joining studies that wait in a storage: ``normkit worker``, on any number of machines."""

import json
from collections.abc import Callable
from pathlib import Path

import optuna

from normkit._errors import nearest
from normkit.study.config import StudyConfig
from normkit.study.data.dataset import Data
from normkit.study.environment import environment, redact, together
from normkit.study.errors import StudyError
from normkit.study.plan import Slot, slots
from normkit.study.records import TrialResult
from normkit.study.store.fingerprint import hold
from normkit.study.store.store import Store
from normkit.study.store.worker import Place, lock_file, run_workers


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
    check: Callable[[StudyConfig], Data],
    say: Callable[[str], None],
) -> int:
    """Work on the studies of a storage until none has work left.

    Args:
        url: The storage.
        study: Name of one study, or None for all.
        count: Worker processes on this machine.
        checkpoints: Folder of checkpoints; shared between machines, a trial goes on where another machine left it.
        check: Loads what a study needs and raises where this machine cannot run it.
        say: Told what happens, line by line.

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
        data = check(config)
        place = Place(url, name, lock_file(url), checkpoints)
        store = place.store()
        hold(store, config, data)
        store.note("environment", together(store.noted("environment"), environment(config.device)))
        ended = 0

        def watch(results: list[TrialResult], _: list[Slot], name: str = name, config: StudyConfig = config) -> None:
            nonlocal ended
            if len(results) > ended:
                ended = len(results)
                say(f"{name}: {ended} of {len(slots(config))} trials have ended")

        run_workers(place, config, count, watch)
    return len(waiting)
