"""The store of trials: an Optuna study, in SQLite by default or in any other Optuna storage.

Every slot of the plan is one Optuna trial that waits from the start, so that any number of processes can work on one
study: claiming is one atomic change of state. A slot whose worker died is freed and claimed again. Nothing here trains.
"""

import contextlib
import json
import os
import socket
import threading
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import optuna
from filelock import FileLock
from optuna.trial import FrozenTrial, TrialState, create_trial

from normkit.study.config import StudyConfig
from normkit.study.environment import redact
from normkit.study.errors import StudyError
from normkit.study.plan import Slot, resolve, slots
from normkit.study.records import CurvePoint, TrialKey, TrialResult
from normkit.study.store import connection
from normkit.study.store.connection import connect, patient

MAX_DEATHS = 3  # of workers on one trial before it is taken to be the reason
MIN_PEERS = 2  # that must have reached a point before a run can be pruned there
_HOST = f"{socket.gethostname()}-{uuid.getnode():x}"


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
        try:
            self.storage = connect(url)
        except Exception as error:
            reason = redact(str(error).partition("\n")[0], url)
            raise StudyError(
                f"--storage {redact(url)}: cannot be opened ({reason}); check the URL, the server, its driver and the rights"
            ) from error
        self.name = name
        self._lock = FileLock(lock) if lock is not None else contextlib.nullcontext()

    # -- the plan -----------------------------------------------------------------------------------------------------

    @patient
    def open(self, config: StudyConfig) -> None:
        """Create the study, or join it if it is there, and put every slot of the plan in it.

        Raises:
            StudyError: The study is there with another configuration.
        """
        with self._lock:
            study = optuna.create_study(
                storage=self.storage, study_name=self.name, direction="maximize", load_if_exists=True
            )
            text = json.dumps(config.to_dict(), sort_keys=True)
            kept = study.user_attrs.get("config")
            if kept is None:
                study.set_user_attr("config", text)
            elif kept != text:
                raise StudyError(difference(json.loads(kept), config.to_dict()))
            have = {_slot(trial) for trial in study.get_trials(deepcopy=False)}
            for slot in slots(config):
                if slot not in have:
                    study.add_trial(create_trial(state=TrialState.WAITING, user_attrs={"slot": asdict(slot)}))
        self.config = config

    def exists(self) -> bool:
        """Return whether the storage has the study."""
        return self.name in optuna.get_all_study_names(self.storage)

    @property
    def study_id(self) -> int:
        """Optuna's number of the study."""
        return self.storage.get_study_id_from_name(self.name)

    def _trials(self) -> dict[Slot, FrozenTrial]:
        """The trial of each slot: of several, the first with a result, else the first that is not dead.

        There are several when two processes opened the study at once, or a dead worker's slot was given out again.
        """
        chosen: dict[Slot, FrozenTrial] = {}
        for trial in self.storage.get_all_trials(self.study_id, deepcopy=False):
            slot = _slot(trial)
            kept = chosen.get(slot)
            if kept is None or (_rank(trial) < _rank(kept)):
                chosen[slot] = trial
        return chosen

    # -- work ---------------------------------------------------------------------------------------------------------

    @patient
    def claim(self) -> Claim | None:
        """The next slot that can run, now this process's; None when nothing can run at present.

        A slot for which the search found no learning rate that works is closed with the reason.
        """
        with self._lock:
            trials = self._trials()
            results = [_result(trial) for trial in trials.values() if _ended(trial)]
            for slot, trial in trials.items():
                if trial.state != TrialState.WAITING:
                    continue
                resolved = resolve(slot, results, self.config)
                if resolved is None or not self._take(trial):
                    continue
                if isinstance(resolved, str):
                    key = TrialKey(slot.phase, slot.method, slot.batch_size, 0.0, slot.seed)
                    self.record(Claim(trial._trial_id, slot, key), TrialResult(key, "failed", error=resolved))
                    continue
                return Claim(trial._trial_id, slot, resolved)
        return None

    def _take(self, trial: FrozenTrial) -> bool:
        try:
            taken = self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        if taken:  # from here on the claim is this process's: only signing it is repeated while the storage is away
            patient(self.storage.set_trial_user_attr)(trial._trial_id, "owner", owner())
            patient(self.storage.record_heartbeat)(trial._trial_id)
        return taken

    @patient
    def record(self, claim: Claim, result: TrialResult) -> None:
        """Keep the result of a claimed slot; a result that arrived first (after a takeover) is not overwritten."""
        state = TrialState.COMPLETE if result.state == "finished" else TrialState.FAIL
        values = [result.validation_accuracy or 0.0] if state == TrialState.COMPLETE else None
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(claim.trial_id, "result", json.dumps(result.to_dict()))
            self.storage.set_trial_state_values(claim.trial_id, state, values)

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
    def requeue_dead(self, dead: Sequence[str] = (), error: str | None = None) -> int:
        """Queue the slots of dead workers again and return how many.

        Gone are owners in ``dead``, processes of this host that do not run any more, and workers without a heartbeat. A
        slot whose workers died ``MAX_DEATHS`` times is closed as failed: it is the trial that ends them (memory, say).

        Args:
            dead: Owners known to be gone.
            error: How they went, for a slot that is closed.
        """
        stale = set(self.storage._get_stale_trial_ids(self.study_id))
        freed = 0
        with self._lock:
            deaths = Counter(map(_slot, filter(_died, self.storage.get_all_trials(self.study_id, deepcopy=False))))
            for slot, trial in self._trials().items():
                holder = trial.user_attrs.get("owner", "")
                gone = holder in dead or trial._trial_id in stale or _abandoned(trial)
                if _ended(trial) or not (_died(trial) or (trial.state == TrialState.RUNNING and gone)):
                    continue
                resolved = resolve(slot, self.results(), self.config)
                if (
                    trial.state == TrialState.RUNNING
                    and deaths[slot] + 1 >= MAX_DEATHS
                    and isinstance(resolved, TrialKey)
                ):
                    reason = f"{error or 'its worker ended'} ({MAX_DEATHS} times)"
                    self.record(Claim(trial._trial_id, slot, resolved), TrialResult(resolved, "failed", error=reason))
                    freed += 1
                elif _died(trial) or self._mark_failed(trial):
                    again = create_trial(state=TrialState.WAITING, user_attrs={"slot": asdict(slot)})
                    self.storage.create_new_trial(self.study_id, again)
                    freed += 1
        return freed

    def _mark_failed(self, trial: FrozenTrial) -> bool:
        """Mark a trial as failed; False if another process did so, or a result came, first."""
        try:
            return self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False

    @patient
    def below_median(self, claim: Claim, point: CurvePoint) -> bool:
        """Keep a point of a search run, and say whether the run is below the median of its peers there.

        Peers are the other search runs of the same method and batch size: methods never prune one another, and final
        runs are never pruned. No run is pruned in the first third of its budget, or by fewer than two peers.
        """
        if claim.slot.phase != "search" or point.validation_accuracy is None:
            return False
        self.storage.set_trial_intermediate_value(claim.trial_id, point.examples, point.validation_accuracy)
        if 3 * point.examples < self.config.budget:
            return False
        peers = [
            trial.intermediate_values[point.examples]
            for slot, trial in self._trials().items()
            if slot.phase == "search" and slot.cell == claim.slot.cell and slot != claim.slot
            if point.examples in trial.intermediate_values
        ]
        return len(peers) >= MIN_PEERS and point.validation_accuracy < median(peers)

    # -- what there is ------------------------------------------------------------------------------------------------

    @patient
    def results(self) -> list[TrialResult]:
        """Results of all slots that ended, in the plan's order."""
        return [_result(trial) for trial in self._trials().values() if _ended(trial)]

    @patient
    def running(self) -> list[Slot]:
        """Slots that some worker has claimed and not ended."""
        return [slot for slot, t in self._trials().items() if t.state == TrialState.RUNNING and not _ended(t)]

    @patient
    def set_attr(self, name: str, value: Any) -> None:
        """Keep a JSON-ready value beside the trials."""
        self.storage.set_study_user_attr(self.study_id, name, value)

    @patient
    def get_attr(self, name: str) -> Any:
        """The value kept under ``name``, or None."""
        return self.storage.get_study_user_attrs(self.study_id).get(name)


def owner(pid: int | None = None) -> str:
    """A process of this host (default: this one), as processes on other hosts can name it."""
    return f"{_HOST}:{pid or os.getpid()}"


def alive(holder: str) -> bool:
    """False if ``holder`` is a process of this host that does not run; others are judged by their heartbeat."""
    host, _, pid = holder.rpartition(":")
    if host != _HOST:
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def difference(kept: dict[str, Any], given: dict[str, Any]) -> str:
    """Return the differences of two configurations as an error message."""
    keys = [key for key in sorted({*kept, *given}) if kept.get(key) != given.get(key)]
    changes = "; ".join(f"{key}: kept {kept.get(key)}, given {given.get(key)}" for key in keys)
    return f"--out holds a study with another configuration ({changes}); give another --out, or the kept values"


def _abandoned(trial: FrozenTrial) -> bool:
    """Return whether the trial's process is gone, or was gone before it could sign its claim."""
    if "owner" in trial.user_attrs:
        return not alive(trial.user_attrs["owner"])
    started = trial.datetime_start
    return started is not None and (datetime.now() - started).total_seconds() > connection.GRACE_SECONDS


def _slot(trial: FrozenTrial) -> Slot:
    return Slot(**trial.user_attrs["slot"])


def _ended(trial: FrozenTrial) -> bool:
    return "result" in trial.user_attrs


def _died(trial: FrozenTrial) -> bool:
    """Return whether the trial was given up without a result, its worker gone."""
    return trial.state == TrialState.FAIL and not _ended(trial)


def _result(trial: FrozenTrial) -> TrialResult:
    return TrialResult.from_dict(json.loads(trial.user_attrs["result"]))


def _rank(trial: FrozenTrial) -> tuple[int, int]:
    """Order of trials of one slot: a result first, then a live one, a dead one last; among equals the oldest."""
    if _ended(trial):
        return 0, trial.number
    return (2 if trial.state.is_finished() else 1), trial.number
