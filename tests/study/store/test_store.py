"""The store: slots are claimed once, nothing is lost, a dead worker's slot is run again."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from optuna.trial import TrialState
from sqlalchemy.engine import make_url

from normkit.study.config import StudyConfig
from normkit.study.environment import redact
from normkit.study.errors import StudyError
from normkit.study.folder import StudyFolder
from normkit.study.plan import SEARCH_SEED, Slot, learning_rates, slots
from normkit.study.records import CurvePoint, TrialKey, TrialResult
from normkit.study.store.owner import alive, owner
from normkit.study.store.store import Store
from normkit.study.store.worker import lock_file
from tests.study.store import idle_worker

CONFIG = StudyConfig(methods=("batch",), batch_sizes=(8,), seeds=3, lr_points=2, lr_extend=0)


def make(folder, config=CONFIG):
    store = Store(f"sqlite:///{folder / 'study.db'}", "test", folder / "lock")
    store.open(config)
    return store


def finish(store, claim, accuracy=0.5):
    store.record(claim, TrialResult(claim.key, "finished", validation_score=accuracy, validation_loss=1.0))


def run_scripts(folder, *scripts):
    """Run scripts side by side, each in a process of its own with this module's helpers."""
    head = "import os, pathlib, signal, time\n"
    head += f"from tests.study.store.test_store import finish, make; folder = pathlib.Path({str(folder)!r})\n"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen([sys.executable, "-c", head + script], stdout=subprocess.PIPE, text=True, env=environment)
        for script in scripts
    ]
    outputs = [process.communicate(timeout=60)[0] for process in started]
    return [
        subprocess.CompletedProcess(p.args, p.returncode, output) for p, output in zip(started, outputs, strict=True)
    ]


def test_each_slot_is_claimed_once_and_finals_wait_for_the_search(tmp_path):
    store = make(tmp_path)
    searches = [store.claim(), store.claim()]
    assert {c.slot.phase for c in searches} == {"search"}
    assert store.claim() is None  # the finals' learning rate is not known yet
    assert len(store.running()) == 2
    for claim, accuracy in zip(searches, (0.2, 0.9), strict=True):
        finish(store, claim, accuracy)
    finals = [store.claim() for _ in range(3)]
    assert {c.key.lr for c in finals} == {searches[1].key.lr}
    assert {c.key.seed for c in finals} == {0, 1, 2}
    assert store.claim() is None


def test_a_search_whose_best_rate_is_at_an_end_adds_rates_before_the_final_runs(tmp_path):
    config = dataclasses.replace(CONFIG, methods=("batch", "group"), lr_extend=1)
    stores = [make(tmp_path, config), make(tmp_path, config)]
    grid = learning_rates(config, "batch", 8)
    for claim in [stores[0].claim(), stores[1].claim(), stores[0].claim(), stores[1].claim()]:
        finish(
            stores[claim.slot.method == "batch"],
            claim,
            0.1 * grid.index(claim.key.lr) if claim.slot.method == "batch" else 0.5,
        )
    added = [stores[0].claim(), stores[1].claim()]
    assert {c.key.lr for c in added if c.slot.method == "batch"} == {learning_rates(config, "batch", 8, above=1)[-1]}
    assert all(c.slot.phase == "search" for c in added)
    assert stores[0].claim() is None  # finals wait for what was added
    assert not stores[0].has_ended()
    for claim in added:
        finish(stores[0], claim, 0.0)
    finals = [stores[1].claim() for _ in range(6)]
    assert {c.key.lr for c in finals if c.slot.method == "batch"} == {grid[-1]}
    for claim in finals:
        finish(stores[0], claim)
    assert all(store.claim() is None and store.has_ended() for store in stores)


def test_what_a_search_adds_is_queued_by_the_next_claim_where_its_worker_was_killed_before(tmp_path):
    config = dataclasses.replace(CONFIG, lr_extend=1)
    store = make(tmp_path, config)
    searches = [store.claim(), store.claim()]
    for claim in searches:
        result = TrialResult(claim.key, "finished", validation_score=claim.key.lr, validation_loss=1.0)
        store.storage.set_trial_user_attr(claim.trial_id, "result", json.dumps(result.to_dict()))
    store.requeue({owner(): None})
    assert store.claim().key == TrialKey(
        "search", "batch", 8, learning_rates(config, "batch", 8, above=1)[-1], SEARCH_SEED
    )


def test_a_result_comes_back_equal(tmp_path):
    store = make(tmp_path)
    claim = store.claim()
    result = TrialResult(claim.key, "diverged", error="non-finite", seconds=1.5, curve=(CurvePoint(8, 2.0, 0.1),))
    store.record(claim, result)
    assert make(tmp_path).results() == [result]


def test_opening_again_adds_nothing(tmp_path):
    store = make(tmp_path)
    finish(store, store.claim())
    again = make(tmp_path)
    assert len(again.storage.get_all_trials(again.study_id)) == len(slots(CONFIG))
    assert len(again.results()) == 1


def test_another_configuration_is_refused_with_the_difference(tmp_path):
    make(tmp_path)
    with pytest.raises(StudyError, match="lr_points: kept 2, given 3; seeds: kept 3, given 4"):
        make(tmp_path, StudyConfig(methods=("batch",), batch_sizes=(8,), seeds=4, lr_points=3, lr_extend=0))


def test_a_study_is_extended_by_methods_seeds_and_smaller_batch_sizes_alone(tmp_path):
    store = make(tmp_path)
    store.set_attr("costs", [1])
    for _ in range(5):
        finish(store, store.claim())
    before = store.results()
    grown = dataclasses.replace(CONFIG, methods=("none", "batch"), batch_sizes=(8, 4), seeds=4)
    again = make(tmp_path, grown)
    assert again.get_attr("costs") is None
    assert set(before) <= set(again.results())
    assert not again.has_ended()
    while (claim := again.claim()) is not None:
        assert claim.key not in {result.key for result in before}
        finish(again, claim)
    assert len(again.results()) == len(slots(grown)) == len({r.key for r in again.results()})
    assert again.get_attr("grown") == [{"methods": ["batch"], "batch_sizes": [8], "seeds": 3}]
    for less in (CONFIG, dataclasses.replace(grown, batch_sizes=(16, 8, 4)), dataclasses.replace(grown, budget=7)):
        with pytest.raises(StudyError, match="may be added"):
            make(tmp_path, less)


def test_a_study_that_runs_is_not_extended(tmp_path):
    store = make(tmp_path)
    claim = store.claim()
    with pytest.raises(StudyError, match="is running with fewer methods"):
        make(tmp_path, dataclasses.replace(CONFIG, seeds=4))
    finish(store, claim)
    make(tmp_path, dataclasses.replace(CONFIG, seeds=4))


def test_methods_in_another_order_are_the_same_study(tmp_path):
    config = dataclasses.replace(CONFIG, methods=("batch", "group", "none"))
    store = make(tmp_path, config)
    store.set_attr("costs", [1])
    finish(store, store.claim())
    again = make(tmp_path, dataclasses.replace(config, methods=("none", "batch", "group")))
    assert again.get_attr("costs") == [1]
    assert again.get_attr("grown") is None
    assert len(again.results()) == 1


@pytest.mark.parametrize("methods", [("none", "group"), ("group", "none", "batch")])
def test_a_study_keeps_its_reference(tmp_path, methods):
    config = dataclasses.replace(CONFIG, methods=("group", "none"))
    make(tmp_path, config)
    with pytest.raises(
        StudyError, match=f"the reference: kept group, given {'batch' if 'batch' in methods else 'none'}"
    ):
        make(tmp_path, dataclasses.replace(config, methods=methods))


@pytest.mark.slow
def test_the_slot_of_a_killed_process_is_run_again_and_counted_once(tmp_path):
    make(tmp_path)
    (killed,) = run_scripts(tmp_path, "make(folder).claim(); os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.returncode == -signal.SIGKILL
    store = make(tmp_path)
    (lost,) = store.running()
    assert len(store.requeue()) == 1
    again = [store.claim(), store.claim()]
    assert lost in [c.slot for c in again]
    for claim in again:
        finish(store, claim)
    for claim in (store.claim() for _ in range(3)):
        finish(store, claim)
    assert len(store.results()) == len(slots(CONFIG)) == len({r.key for r in store.results()})


def test_a_result_that_comes_after_a_takeover_is_not_counted(tmp_path):
    store = make(tmp_path)
    slow = store.claim()
    store.storage.set_trial_user_attr(slow.trial_id, "owner", owner(2**22 + 1))  # no such process
    assert store.requeue() == {owner(2**22 + 1)}
    quick = next(c for c in (store.claim(), store.claim()) if c.slot == slow.slot)
    finish(store, quick, 0.9)
    finish(store, slow, 0.1)
    assert [r.validation_score for r in store.results()] == [0.9]


def test_a_trial_whose_workers_died_three_times_is_closed_as_failed(tmp_path):
    store = make(tmp_path, StudyConfig(methods=("batch",), batch_sizes=(8,), seeds=1, lr=0.1))
    for _ in range(2):
        claim = store.claim()
        assert store.requeue({owner(): "killed"}) == {owner()}
        assert store.results() == []
    claim = store.claim()
    assert store.requeue({owner(): "killed"}) == {owner()}
    assert [(r.key, r.state, r.error) for r in store.results()] == [(claim.key, "failed", "killed (3 times)")]


def test_a_slot_whose_freeing_was_interrupted_is_freed_by_the_next(tmp_path):
    store = make(tmp_path)
    claim = store.claim()
    store.storage.set_trial_state_values(claim.trial_id, TrialState.FAIL)  # buried, and then the process was killed
    store.requeue()
    assert {store.claim().slot, store.claim().slot} >= {claim.slot}


def curve_point(examples, accuracy):
    return CurvePoint(examples, 1.0, accuracy)


def test_only_search_runs_below_the_median_of_their_peers_are_pruned(tmp_path):
    config = StudyConfig(
        methods=("batch", "group"), batch_sizes=(8,), seeds=1, lr_points=4, lr_extend=0, budget=300, prune=True
    )
    store = make(tmp_path, config)
    claims = {(c.slot.method, c.slot.lr): c for c in iter(store.claim, None)}
    batch = [c for (method, _), c in sorted(claims.items()) if method == "batch"]
    group = next(c for (method, _), c in claims.items() if method == "group")
    for claim, accuracy in zip(batch[:2], (0.5, 0.7), strict=True):
        assert not store.below_median(claim, curve_point(150, accuracy))
    assert not store.below_median(group, curve_point(150, 0.1))  # another method has no peers yet
    assert not store.below_median(batch[2], curve_point(90, 0.0))  # too early
    assert not store.below_median(batch[2], curve_point(150, 0.6))  # the median itself
    assert store.below_median(batch[3], curve_point(150, 0.59))
    assert not store.below_median(batch[3], curve_point(160, None))


def test_final_runs_are_never_pruned(tmp_path):
    config = StudyConfig(methods=("batch",), batch_sizes=(8,), seeds=4, lr=0.1, budget=300, prune=True)
    store = make(tmp_path, config)
    claims = [store.claim() for _ in range(4)]
    assert not any(
        store.below_median(c, curve_point(200, a)) for c, a in zip(claims, (0.9, 0.8, 0.7, 0.1), strict=True)
    )


def test_when_nothing_works_the_finals_are_closed_with_the_reason(tmp_path):
    store = make(tmp_path)
    for claim in (store.claim(), store.claim()):
        store.record(claim, TrialResult(claim.key, "failed", error="one value per channel"))
    assert store.claim() is None
    finals = [r for r in store.results() if r.key.phase == "final"]
    assert [(r.state, r.error) for r in finals] == [("failed", "one value per channel")] * 3


_WORKER = """
store = make(folder)
while len(store.results()) < 5:
    claim = store.claim()
    if claim is None:
        time.sleep(0.02)
    else:
        finish(store, claim)
        print(claim.key.phase, claim.key.lr, claim.key.seed)
"""


@pytest.mark.slow
def test_two_processes_share_one_study_and_no_slot_is_done_twice(tmp_path):
    lines = [line for process in run_scripts(tmp_path, _WORKER, _WORKER) for line in process.stdout.splitlines()]
    assert len(lines) == len(set(lines)) == len(slots(CONFIG))
    store = make(tmp_path)
    assert len(store.results()) == len(slots(CONFIG))
    assert all(t.state == TrialState.COMPLETE for t in store.storage.get_all_trials(store.study_id))


@pytest.mark.slow
def test_workers_killed_at_random_moments_lose_and_double_nothing(tmp_path):
    url, config = f"sqlite:///{tmp_path / 'study.db'}", StudyConfig(batch_sizes=(32,), seeds=10, lr=0.1)
    killed = idle_worker.run(idle_worker.starter(url, config, 0.02), workers=3, kills=6, every=0.4)
    assert killed > 0
    store = Store(url, "idle", lock_file(url))
    recorded = [
        Slot(**t.user_attrs["slot"]) for t in store.storage.get_all_trials(store.study_id) if "result" in t.user_attrs
    ]
    assert len(recorded) == len(set(recorded)) == len(slots(config)) == len(store.results())


def test_claims_of_this_process_are_alive_and_of_a_dead_one_are_not():
    assert alive(owner())
    assert not alive(owner(2**22 + 1))
    assert alive("another-host|boot|pid:[1]|1|1")  # judged by its heartbeat


def test_heartbeat_is_recorded_while_a_claim_is_worked_on(tmp_path, monkeypatch):
    monkeypatch.setattr("normkit.study.store.connection.HEARTBEAT_SECONDS", 0.02)
    store, beats = make(tmp_path), []
    claim = store.claim()
    monkeypatch.setattr(store.storage, "record_heartbeat", beats.append)
    with store.heartbeat(claim):
        time.sleep(0.3)
    assert len(beats) > 2
    assert set(beats) == {claim.trial_id}


def test_a_password_appears_in_no_message(tmp_path):
    url = "postgresql+psycopg2://me:hunter2@127.0.0.1:1/none"
    with pytest.raises(StudyError) as caught:
        Store(url, "test")
    assert "hunter2" not in str(caught.value)
    assert redact(f"cannot reach {url}", url) == "cannot reach postgresql+psycopg2://me:***@127.0.0.1:1/none"


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_storage_in_memory_is_refused_since_no_worker_would_see_it(url):
    with pytest.raises(StudyError, match="in the memory of one process, give a file"):
        Store(url, "test")


QUOTES_PATHS = make_url("sqlite:///a%3Fb").database == "a?b"  # SQLAlchemy from 2.1 on, which Python 3.10 does not have


@pytest.mark.parametrize("name", ["a b", "q?x=1", "h#1", "p%41", "ä"])
def test_trials_stay_in_the_output_folder_whatever_its_name(name, tmp_path):
    folder = StudyFolder(tmp_path / name, CONFIG, "", None)
    if "?" in name and not QUOTES_PATHS:
        with pytest.raises(StudyError, match=r"--out .*give a path without '\?'"):
            folder.prepare()
        assert list(tmp_path.iterdir()) == []
        return
    folder.prepare()
    folder.address(None).store().open(CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert {path.name for path in folder.path.iterdir()} == {"study.db", "study.db.lock"}
