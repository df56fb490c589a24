"""The trials of one study as this process knows them, read again only where they have changed.

Optuna reads a trial with everything that belongs to it, 0.4 ms each, so a claim in a plan of 10,000 would take seconds. Here the
states of the trials that do not wait any more are read, and attributes of the changed ones. A claim is one transaction, and so is
a result with the state it leads to: a worker that is killed in the middle has changed nothing.
"""

import json
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from optuna.storages import RDBStorage
from optuna.storages._rdb.models import TrialHeartbeatModel, TrialModel, TrialUserAttributeModel, TrialValueModel
from optuna.trial import TrialState
from sqlalchemy import Connection, Enum, String, and_, bindparam, column, func, insert, or_, select, table, type_coerce
from sqlalchemy.orm import Session

from normkit.study.plan import Slot
from normkit.study.records import TrialResult

logger = logging.getLogger(__name__)

_STUDIES = table("studies", column("study_id"), column("study_name"))
_STUDY_ATTRIBUTES = table("study_user_attributes", column("study_id"), column("key"), column("value_json"))
_TRIALS = table("trials", column("trial_id"), column("study_id"), column("number"), column("state", Enum(TrialState)))
_ATTRIBUTES = table("trial_user_attributes", column("trial_id"), column("key"), column("value_json"))
_CHUNK = 500  # trials in one query: databases bound the number of parameters


@dataclass(frozen=True)
class Row:
    """One trial.

    Attributes:
        trial_id: Optuna's number of the trial.
        state: Its state.
        slot: Its slot of the plan.
        generation: How often the slot was asked for again after it had failed; the latest counts.
        result: Its result, if it has one.
        death: How its worker died by itself, if it did.
    """

    trial_id: int
    state: TrialState
    slot: Slot
    generation: int = 0
    result: TrialResult | None = None
    death: str | None = None

    @property
    def rank(self) -> tuple[int, int, int]:
        """Order of trials of one slot: the latest generation, a result first, then a live one; among equals the oldest."""
        state = 0 if self.result is not None else 2 if self.state.is_finished() else 1
        return -self.generation, state, self.trial_id


class Rows:
    """The trials of a study.

    Args:
        storage: The storage.
        study: Name of the study.
    """

    def __init__(self, storage: RDBStorage, study: str) -> None:
        self.storage, self.study = storage, study
        self._study_id: int | None = None
        self._states: dict[int, str] = {}
        self._foreign: set[int] = set()
        self._unended: deque[int] = deque()  # trials that may change, and ended ones behind the first of them
        self._newest = -1
        self._rows: dict[int, Row] = {}
        self._by_slot: dict[Slot, dict[int, Row]] = {}
        self._chosen: dict[Slot, Row] = {}  # in the plan's order
        self._waiting: dict[str, dict[Slot, None]] = {"search": {}, "final": {}}
        self._searches: dict[tuple[str, int], dict[Slot, TrialResult]] = {}

    @property
    def study_id(self) -> int:
        """Optuna's number of the study."""
        if self._study_id is None:
            self._study_id = self.storage.get_study_id_from_name(self.study)
        return self._study_id

    # -- reading ------------------------------------------------------------------------------------------------------

    def attribute(self, name: str) -> Any:
        """The value kept beside the trials under ``name``; None where there is none, or one that is not JSON."""
        chosen = and_(_STUDY_ATTRIBUTES.c.study_id == self.study_id, _STUDY_ATTRIBUTES.c.key == name)
        with self.storage.engine.connect() as connection:
            text = connection.execute(select(_STUDY_ATTRIBUTES.c.value_json).where(chosen)).scalar()
        return None if text is None else _json(text, f"study {self.study}: its {name!r}")

    def refresh(self) -> None:
        """Read what has changed."""
        while self._unended and TrialState[self._states[self._unended[0]]].is_finished():
            self._unended.popleft()  # a plan is worked on in its order: most of what has ended is never read again
        first = self._unended[0] if self._unended else self._newest + 1
        begun = and_(_TRIALS.c.trial_id >= first, _TRIALS.c.state != TrialState.WAITING)
        with self.storage.engine.connect() as connection:
            query = select(_TRIALS.c.trial_id, type_coerce(_TRIALS.c.state, String)).where(
                _TRIALS.c.study_id == self.study_id, or_(_TRIALS.c.trial_id > self._newest, begun)
            )
            states = dict(connection.execute(query.order_by(_TRIALS.c.trial_id)).all())
            # a running trial may have got its result since
            known = self._states.keys() - self._foreign
            changed = [i for i, s in states.items() if self._states.get(i) != s or (s == "RUNNING" and i in known)]
            attributes = self._attributes(connection, changed)
        self._unended.extend(i for i in states if i > self._newest)
        self._newest = max(self._newest, *states, -1)
        self._states |= states
        for trial_id in changed:
            self._put(trial_id, TrialState[states[trial_id]], attributes.get(trial_id, {}))

    def _attributes(self, connection: Connection, trial_ids: Sequence[int]) -> dict[int, dict[str, str]]:
        found: dict[int, dict[str, str]] = {}
        query = select(_ATTRIBUTES).where(_ATTRIBUTES.c.trial_id.in_(bindparam("ids", expanding=True)))
        for start in range(0, len(trial_ids), _CHUNK):
            ids = trial_ids[start : start + _CHUNK]
            for trial_id, key, text in connection.execute(query, {"ids": ids}):
                found.setdefault(trial_id, {})[key] = text
        return found

    def _put(self, trial_id: int, state: TrialState, attributes: dict[str, str]) -> None:
        what = f"study {self.study}: trial {trial_id}"
        known = self._rows.get(trial_id)
        if known is None:
            try:
                kept = json.loads(attributes["slot"])
                slot, generation = Slot(**kept), json.loads(attributes.get("generation", "0"))
                hash(slot)
                known = Row(trial_id, state, slot, int(generation))
            except (KeyError, TypeError, ValueError) as error:
                if trial_id not in self._foreign:
                    logger.warning("%s is not of this study's plan, and is left alone (%s)", what, type(error).__name__)
                self._foreign.add(trial_id)
                return
        result = known.result
        if result is None and "result" in attributes:
            try:
                result = TrialResult.from_dict(json.loads(json.loads(attributes["result"])))
            except (KeyError, TypeError, ValueError) as error:
                logger.warning("%s has a damaged result (%s), and is run again", what, type(error).__name__)
        death = _json(attributes["death"], f"{what}: its 'death'") if "death" in attributes else None
        self._choose(Row(trial_id, state, known.slot, known.generation, result, death))

    def _choose(self, row: Row) -> None:
        slot = row.slot
        self._rows[row.trial_id] = row
        self._by_slot.setdefault(slot, {})[row.trial_id] = row
        best = self._chosen[slot] = min(self._by_slot[slot].values(), key=lambda row: row.rank)
        if best.state == TrialState.WAITING:
            self._waiting[slot.phase].setdefault(slot)
        else:
            self._waiting[slot.phase].pop(slot, None)
        if slot.phase == "search":
            cell = self._searches.setdefault(slot.cell, {})
            if best.result is not None:
                cell[slot] = best.result
            else:
                cell.pop(slot, None)

    # -- what there is ------------------------------------------------------------------------------------------------

    def chosen(self) -> Iterator[Row]:
        """The trial of each slot, in the plan's order: of several, the first with a result, else the first not dead."""
        return iter(self._chosen.values())

    def __contains__(self, slot: Slot) -> bool:
        return slot in self._chosen

    def waiting(self) -> Iterator[Row]:
        """The trials that can be claimed, searches first, since final runs wait for them."""
        return (self._chosen[slot] for slots in self._waiting.values() for slot in slots)

    def running(self) -> list[tuple[Row, str]]:
        """Trials that were claimed and are not closed, each with its owner; empty where it has none."""
        rows = [self._rows[i] for i, state in self._states.items() if state == "RUNNING" and i in self._rows]
        with self.storage.engine.connect() as connection:
            attributes = self._attributes(connection, [row.trial_id for row in rows])
        return [(row, str(_json(attributes.get(row.trial_id, {}).get("owner", '""'), "owner"))) for row in rows]

    def dead(self) -> list[Row]:
        """Trials without a result whose workers are gone, and that nobody has queued again."""
        return [row for row in self._chosen.values() if row.state.is_finished() and row.result is None]

    def deaths(self, slot: Slot) -> int:
        """How many workers died by themselves in the latest generation of a slot."""
        latest = self._chosen[slot].generation
        return sum(row.death is not None for row in self._by_slot[slot].values() if row.generation == latest)

    def searched(self, cell: tuple[str, int]) -> list[TrialResult]:
        """Results of the search runs of a method and batch size."""
        return list(self._searches.get(cell, {}).values())

    # -- writing ------------------------------------------------------------------------------------------------------

    def claim(self, trial_id: int, owner: str) -> bool:
        """Make a trial ``owner``'s, with a first heartbeat; False if it does not wait any more."""
        with Session(self.storage.engine) as session, session.begin():
            trial = session.get(TrialModel, trial_id, with_for_update=True)
            if trial is None or trial.state is not TrialState.WAITING:
                return False
            trial.state, trial.datetime_start = TrialState.RUNNING, datetime.now()
            session.add(TrialUserAttributeModel(trial_id=trial_id, key="owner", value_json=json.dumps(owner)))
            session.add(TrialHeartbeatModel(trial_id=trial_id))
        return True

    def end(self, trial_id: int, result: TrialResult) -> None:
        """Keep a result and change the state of its trial, if the trial still runs."""
        with Session(self.storage.engine) as session, session.begin():
            trial = session.get(TrialModel, trial_id, with_for_update=True)
            if trial is None or trial.state is not TrialState.RUNNING:
                return
            text = json.dumps(json.dumps(result.to_dict()))
            session.add(TrialUserAttributeModel(trial_id=trial_id, key="result", value_json=text))
            trial.state, trial.datetime_complete = TrialState.FAIL, datetime.now()
            if result.state == "finished":
                trial.state = TrialState.COMPLETE
                value, kind = TrialValueModel.value_to_stored_repr(result.validation_score or 0.0)
                session.add(TrialValueModel(trial_id=trial_id, objective=0, value=value, value_type=kind))

    # -- the plan -----------------------------------------------------------------------------------------------------

    def plan(self, planned: Sequence[Slot]) -> None:
        """Queue the slots that have no trial yet, all in one transaction."""
        with self.storage.engine.begin() as connection:
            mine = _TRIALS.c.study_id == self.study_id
            # other processes that plan the same study wait here
            connection.execute(
                select(_STUDIES.c.study_id).where(_STUDIES.c.study_id == self.study_id).with_for_update()
            )
            of_mine = _ATTRIBUTES.c.trial_id.in_(select(_TRIALS.c.trial_id).where(mine))
            kept = connection.execute(select(_ATTRIBUTES.c.value_json).where(of_mine, _ATTRIBUTES.c.key == "slot"))
            known = (_json(text, "slot") for text in kept.scalars())
            have = {json.dumps(slot, sort_keys=True) for slot in known if isinstance(slot, dict)}
            missing = [text for slot in planned if (text := json.dumps(asdict(slot), sort_keys=True)) not in have]
            if not missing:
                return
            first = connection.execute(
                select(func.coalesce(func.max(_TRIALS.c.number) + 1, 0)).where(mine)
            ).scalar_one()
            trials = [
                {"study_id": self.study_id, "number": first + place, "state": TrialState.WAITING}
                for place in range(len(missing))
            ]
            connection.execute(insert(_TRIALS), trials)
            made = select(_TRIALS.c.number, _TRIALS.c.trial_id).where(mine, _TRIALS.c.number >= first)
            number_to_id = dict(connection.execute(made).all())
            connection.execute(
                insert(_ATTRIBUTES),
                [
                    {"trial_id": number_to_id[first + place], "key": "slot", "value_json": text}
                    for place, text in enumerate(missing)
                ],
            )


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        logger.warning("%s is not JSON and is left alone", what)
        return None
