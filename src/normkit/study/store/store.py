"""The store of trials: an Optuna study, in SQLite by default or in any other Optuna storage.

Every slot of the plan is one Optuna trial that waits from the start, so that any number of processes can work on one
study: claiming is one atomic change of state. A slot whose worker is gone is freed and claimed again. Nothing here trains.
"""

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import optuna
from filelock import FileLock
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial

from normkit.study.config import StudyConfig
from normkit.study.environment import redact
from normkit.study.errors import StudyError
from normkit.study.identity import difference, extends, pack, unpack
from normkit.study.plan import Slot, resolve, search_slots, slots
from normkit.study.records import CurvePoint, TrialKey, TrialResult
from normkit.study.store import connection
from normkit.study.store.connection import connect, patient
from normkit.study.store.owner import alive, owner
from normkit.study.store.rows import Row, Rows

logger = logging.getLogger(__name__)

MAX_DEATHS = 3  # of workers on one trial before it is taken to be the reason
MIN_PEERS = 2  # that must have reached a point before a run can be pruned there
LOCK_SECONDS = 60.0  # a process that was stopped while it held the lock
LOCK_POLL = 0.005  # seconds between two tries: the lock is held for a few hundredths

_T = TypeVar("_T")


@dataclass(frozen=True)
class Claim:
    """A slot that this process works on, and the key it became."""

    trial_id: int
    slot: Slot
    key: TrialKey


class Store:
    """One study in one storage.

    Args:
        url: SQLAlchemy URL of the storage, for example ``sqlite:///runs/digits/study.db``.
        name: Name of the study in the storage.
        lock: Lock file for storages without row locks (SQLite), else None.
    """

    def __init__(self, url: str, name: str, lock: Path | None = None) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._file_lock = FileLock(lock, timeout=LOCK_SECONDS) if lock is not None else None
        self.storage = self._connected(url)
        self.name = name
        self._rows = Rows(self.storage, name)

    @patient
    def _connected(self, url: str) -> RDBStorage:
        with self._lock:  # of several processes that make a new storage one makes its tables
            try:
                return connect(url)
            except Exception as error:
                reason = redact(str(error).partition("\n")[0], url)
                raise StudyError(
                    f"--storage {redact(url)}: cannot be opened ({reason}); check the URL, the server, its driver and the rights"
                ) from error

    @property
    def _lock(self) -> contextlib.AbstractContextManager[Any]:
        """Within the block no other process changes the study, where the storage itself has no row locks."""
        return contextlib.nullcontext() if self._file_lock is None else self._file_lock.acquire(poll_interval=LOCK_POLL)

    # -- the plan -----------------------------------------------------------------------------------------------------

    @patient
    def open(self, config: StudyConfig) -> None:
        """Create the study, join it, or extend it by methods, seeds or batch sizes, and put every slot of the plan in it.

        Raises:
            StudyError: The study is there with another configuration that this one does not extend, it would be extended while
                it runs, or a newer version made it.
        """
        with self._lock:
            optuna.create_study(storage=self.storage, study_name=self.name, direction="maximize", load_if_exists=True)
            kept = self._rows.attribute("config")
            if kept is None:
                self.storage.set_study_user_attr(self._rows.study_id, "config", json.dumps(pack(config)))
            elif (other := unpack(kept, f"study {self.name} in --storage")) != config:
                self._grow(other, config)
            self._rows.plan(slots(config))
        self.config = config

    def _grow(self, kept: StudyConfig, config: StudyConfig) -> None:
        """Make the study that of ``config``; costs and landscape, which are measured of all methods in turns, are dropped.

        Raises:
            StudyError: ``config`` does not extend what was kept, or the study runs.
        """
        if not extends(config, kept):
            raise StudyError(difference(kept, config))
        if {*slots(config)} == {*slots(kept)}:  # in another order
            self.storage.set_study_user_attr(self.study_id, "config", json.dumps(pack(config)))
            return
        self._rows.refresh()
        if any(alive(holder) for _, holder in self._rows.running()):
            raise StudyError(
                f"study {self.name} is running with fewer methods, seeds or batch sizes; give the new ones when it has ended or "
                "was stopped"
            )
        if any(row.result is not None for row in self._rows.chosen()):
            before = {"methods": list(kept.methods), "batch_sizes": list(kept.batch_sizes), "seeds": kept.seeds}
            self.storage.set_study_user_attr(self.study_id, "grown", [*(self._rows.attribute("grown") or ()), before])
        if self._rows.attribute("landscape"):
            logger.warning(
                "the landscape of %s is dropped, since it lacks the new methods; give --landscape again", self.name
            )
        for name in ("costs", "landscape"):
            self.storage.set_study_user_attr(self.study_id, name, None)
        self.storage.set_study_user_attr(self.study_id, "config", json.dumps(pack(config)))

    @patient
    def exists(self) -> bool:
        """Return whether the storage has the study."""
        return self.name in optuna.get_all_study_names(self.storage)

    @property
    def study_id(self) -> int:
        """Optuna's number of the study."""
        return self._rows.study_id

    # -- work ---------------------------------------------------------------------------------------------------------

    @patient
    def claim(self) -> Claim | None:
        """The next slot that can run, now this process's; None when nothing can run at present.

        A slot for which the search found no learning rate that works is closed with the reason.
        """
        with self._lock:
            return self._take_next()

    def _take_next(self) -> Claim | None:
        self._rows.refresh()
        blocked: set[tuple[str, int]] = set()  # cells whose search has not ended
        added = False
        for row in self._rows.waiting():
            slot = row.slot
            if slot.lr is None and slot.cell in blocked:
                continue
            resolved = self._resolve(slot)
            if resolved is None:
                blocked.add(slot.cell)
                added |= self._extend(slot.cell)
            elif self._rows.claim(row.trial_id, owner()):
                if isinstance(resolved, TrialKey):
                    return Claim(row.trial_id, slot, resolved)
                key = TrialKey(slot.phase, slot.method, slot.batch_size, 0.0, slot.seed)
                self.record(Claim(row.trial_id, slot, key), TrialResult(key, "failed", error=resolved))
        return self._take_next() if added else None

    def _extend(self, cell: tuple[str, int]) -> bool:
        """Queue what a search has added to the plan by its results; False if that is nothing."""
        grown = search_slots(self.config, *cell, self._rows.searched(cell))
        if added := [slot for slot in grown if slot not in self._rows]:
            self._rows.plan(added)
        return bool(added)

    def _resolve(self, slot: Slot) -> TrialKey | str | None:
        return resolve(slot, self._rows.searched(slot.cell) if slot.lr is None else (), self.config)

    @patient
    def record(self, claim: Claim, result: TrialResult) -> None:
        """Keep the result of a claimed slot; a result that arrived first (after a takeover) is not overwritten."""
        with self._lock:
            self._rows.end(claim.trial_id, result)
            if claim.slot.phase == "search":  # what it adds to the plan is tried before final runs
                self._rows.refresh()
                self._extend(claim.slot.cell)

    @contextlib.contextmanager
    def heartbeat(self, claim: Claim) -> Iterator[None]:
        """Tell the storage, from a thread, that the claim's worker is alive."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(connection.HEARTBEAT_SECONDS):
                with contextlib.suppress(Exception):  # a storage that is away for a moment must not end the trial
                    self.storage.record_heartbeat(claim.trial_id)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    @patient
    def requeue(self, gone: Mapping[str, str | None] | None = None) -> set[str]:
        """Queue the slots of workers that are gone again.

        Gone are those that the caller knows to be, processes of this place that do not run any more, and workers without a
        heartbeat. A slot is closed as failed where ``MAX_DEATHS`` workers died in it: the trial then ends them (memory, say).
        A worker that was stopped from outside, or together with its parent, does not count.

        Args:
            gone: Owner -> how its process died by itself, or None where it was stopped.

        Returns:
            The owners whose slots were freed.
        """
        gone = gone or {}
        stale = set(self.storage._get_stale_trial_ids(self.study_id))
        freed = set()
        with self._lock:
            self._rows.refresh()
            for row, holder in self._rows.running():
                if not (holder in gone or row.trial_id in stale or not alive(holder)):
                    continue
                reason = gone.get(holder)
                if (reason is not None and self._deadly(row, reason)) or self._give_up(row, reason):
                    freed.add(holder)
            self._rows.refresh()
            for row in self._rows.dead():
                again = {"slot": asdict(row.slot), "generation": row.generation}
                self.storage.create_new_trial(self.study_id, create_trial(state=TrialState.WAITING, user_attrs=again))
        return freed

    def _deadly(self, row: Row, reason: str) -> bool:
        """Close a slot in which enough workers died; False if it may run again."""
        key = self._resolve(row.slot)
        if self._rows.deaths(row.slot) + 1 < MAX_DEATHS or not isinstance(key, TrialKey):
            return False
        error = f"{reason} ({MAX_DEATHS} times)"
        self.record(Claim(row.trial_id, row.slot, key), TrialResult(key, "failed", error=error))
        return True

    def _give_up(self, row: Row, reason: str | None) -> bool:
        """Mark a trial as failed; False if another process did so, or a result came, first."""
        try:
            if reason is not None:
                self.storage.set_trial_user_attr(row.trial_id, "death", reason)
            return self.storage.set_trial_state_values(row.trial_id, TrialState.FAIL)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False

    @patient
    def retry_failed(self) -> int:
        """Queue every slot that was closed as failed again, its deaths forgotten, and return how many."""
        with self._lock:
            self._rows.refresh()
            failed = [row for row in self._rows.chosen() if row.result is not None and row.result.state == "failed"]
            for row in failed:
                again = {"slot": asdict(row.slot), "generation": row.generation + 1}
                self.storage.create_new_trial(self.study_id, create_trial(state=TrialState.WAITING, user_attrs=again))
        return len(failed)

    @patient
    def below_median(self, claim: Claim, point: CurvePoint) -> bool:
        """Keep a point of a search run, and say whether the run is worse than the median of its peers there.

        Peers are the other search runs of the same method and batch size: methods never prune one another, and final
        runs are never pruned. No run is pruned in the first third of its budget, or by fewer than two peers.
        """
        if claim.slot.phase != "search" or point.validation_score is None:
            return False
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self.storage.set_trial_intermediate_value(claim.trial_id, point.examples, point.validation_score)
        if 3 * point.examples < self.config.budget_of("search"):
            return False
        self._rows.refresh()
        peers = [
            values[point.examples]
            for row in self._rows.chosen()
            if row.slot.phase == "search" and row.slot.cell == claim.slot.cell and row.slot != claim.slot
            if point.examples in (values := self.storage.get_trial(row.trial_id).intermediate_values)
        ]
        sign = 1 if self.config.higher_is_better else -1
        return len(peers) >= MIN_PEERS and sign * point.validation_score < sign * median(peers)

    # -- what there is ------------------------------------------------------------------------------------------------

    @patient
    def results(self) -> list[TrialResult]:
        """Results of all slots that ended, in the plan's order."""
        self._rows.refresh()
        return [row.result for row in self._rows.chosen() if row.result is not None]

    def has_ended(self) -> bool:
        """Return whether every slot of the plan has a result."""
        results = self.results()
        return len(results) >= len(slots(self.config, results))

    @patient
    def running(self) -> list[Slot]:
        """Slots that some worker has claimed and not ended."""
        self._rows.refresh()
        return [row.slot for row in self._rows.chosen() if row.state == TrialState.RUNNING and row.result is None]

    @patient
    def set_attr(self, name: str, value: Any) -> None:
        """Keep a JSON-ready value beside the trials."""
        self.storage.set_study_user_attr(self.study_id, name, value)

    @patient
    def get_attr(self, name: str, read: Callable[[Any], _T] = lambda kept: kept) -> _T | None:
        """The value kept under ``name``, or None.

        Args:
            name: Its name.
            read: Makes of the kept JSON what is returned; where it raises, the value is damaged and counts as absent.
        """
        kept = self._rows.attribute(name)
        if kept is None:
            return None
        try:
            return read(kept)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            logger.warning("study %s: its %r is damaged (%s) and counts as absent", self.name, name, error)
            return None
