"""What others wrote into the storage, or what is damaged there, ends no command: it is skipped and named."""

import json

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from normkit.study.compare import report
from normkit.study.config import StudyConfig
from normkit.study.folder import StudyFolder
from normkit.study.load import load
from normkit.study.plan import slots
from normkit.study.records import TrialResult
from normkit.study.report.render import read_results
from normkit.study.store.fingerprint import check_fingerprint
from normkit.study.store.join_studies import waiting_studies

CONFIG = StudyConfig(methods=("batch",), batch_sizes=(8,), seeds=2, lr=0.1)


@pytest.fixture
def folder(tmp_path):
    folder = StudyFolder(tmp_path, CONFIG, "normkit compare", None)
    folder.save()
    return folder


@pytest.fixture
def store(folder):
    store = folder.address(None).store()
    store.open(CONFIG)
    return store


def add(store, **attributes):
    """A trial of another program's in our study."""
    trial = create_trial(state=TrialState.WAITING, user_attrs=attributes)
    return store.storage.create_new_trial(store.study_id, trial)


@pytest.mark.parametrize(
    "attributes",
    [{}, {"slot": 5}, {"slot": {"phase": "final"}}, {"slot": {**vars(slots(CONFIG)[0]), "method": []}}, {"slot": None}],
)
def test_a_trial_that_is_not_of_the_plan_is_named_and_left_alone(store, attributes, caplog):
    add(store, **attributes)
    claims = [store.claim(), store.claim()]
    assert {claim.slot for claim in claims} == set(slots(CONFIG))
    assert store.claim() is None
    assert sum("is not of this study's plan" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("result", ["{", json.dumps({"key": 1}), json.dumps([]), 7, None])
def test_a_trial_with_a_damaged_result_is_named_and_run_again(store, result, caplog):
    claim = store.claim()
    store.storage.set_trial_user_attr(claim.trial_id, "result", result)
    store.storage.set_trial_state_values(claim.trial_id, TrialState.COMPLETE, [0.5])
    assert store.results() == []
    assert any("damaged result" in message for message in caplog.messages)
    store.requeue()
    assert {store.claim().slot, store.claim().slot} == set(slots(CONFIG))


@pytest.mark.parametrize(
    ("name", "value"),
    [("costs", 5), ("costs", [{"foo": 1}]), ("environment", [1]), ("landscape", [{}]), ("landscape", 3), ("data", 1)],
)
def test_a_report_is_made_without_what_is_damaged_beside_the_trials(folder, store, name, value, caplog):
    claim = store.claim()
    store.record(claim, TrialResult(claim.key, "finished", validation_score=0.5, validation_loss=1.0, test_score=0.5))
    store.set_attr(name, value)
    assert len(report(folder, store).trials) == len(read_results(folder.path / "results.json").trials) == 1
    assert any(f"its {name!r} is damaged" in message for message in caplog.messages)


@pytest.mark.parametrize("value", [5, "text", {"data": 1}, {"data": {}, "model": []}])
def test_a_damaged_fingerprint_is_named_and_taken_anew(store, value, caplog):
    task = load(CONFIG)
    store.set_attr("identity", value)
    check_fingerprint(store, CONFIG, task)
    assert any("'identity' is damaged" in message for message in caplog.messages)
    assert set(store.get_attr("identity")) == {"data", "model"}
    check_fingerprint(store, CONFIG, task)


def test_workers_skip_and_name_the_studies_of_other_programs(store, folder, caplog):
    values = [5, "{", {"lr": 1}, {"format": "x"}, {"format": 2, "options": {"methods": 3}, "revisions": {}}]
    for number, value in enumerate(values):
        optuna.create_study(storage=store.storage, study_name=f"other-{number}").set_user_attr("config", value)
    optuna.create_study(storage=store.storage, study_name="plain")
    assert waiting_studies(folder.address(None).url) == {folder.name: CONFIG}
    skipped = [message for message in caplog.messages if message.startswith("skipped study ")]
    assert len(skipped) == len(values)
    assert all(f"other-{number}" in message for number, message in enumerate(sorted(skipped)))
