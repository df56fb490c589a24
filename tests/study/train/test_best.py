"""The best weights of a run: kept once, found where the run was best, judged in place of the last."""

import dataclasses

import pytest
import torch
from torch import nn

from normkit.study.config import StudyConfig
from normkit.study.errors import StudyError
from normkit.study.load import load
from normkit.study.plan import validate
from normkit.study.records import TrialKey
from normkit.study.train.loop import Loop, evaluate
from normkit.study.train.trial import build_trial, run_trial
from normkit.study.train.weights import BestWeights

CONFIG = StudyConfig(
    model="digits-cnn", batch_sizes=(16,), budget=240, limit=100, schedule="constant", best_weights=True
)  # 80 examples train: three epochs
KEY = TrialKey("final", "batch", 16, 0.2, 0)


@pytest.fixture(scope="module")
def task():
    return load(CONFIG)


def test_of_equal_accuracies_the_earliest_is_kept_with_its_running_statistics():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    best = BestWeights(net)
    kept = None
    for step, accuracy in enumerate((0.5, 0.7, 0.7, 0.6), start=1):
        net(torch.randn(4, 2))
        with torch.no_grad():
            net[0].weight.fill_(step)
        best.offer(accuracy, step)
        kept = {k: v.clone() for k, v in net.state_dict().items()} if step == 2 else kept
    best.restore()
    assert (best.score, best.step) == (0.7, 2)
    assert all(torch.equal(v, kept[k]) for k, v in net.state_dict().items())


class Recorded(Loop):
    """Keeps what the weights of a step are worth, wherever the run is validated, and no weights."""

    def _validate(self, step):
        with self.evaluated():
            splits = "validation", "test"
            self.outcomes[step] = [evaluate(self.model, self.task, split, self.config) for split in splits]
        return self.outcomes[step][0][0]

    def _ended_epoch(self, examples):
        return self.seen % 80 == 0


@pytest.mark.parametrize("options", [{}, {"ema": 0.8}, {"micro_batch": 5}, {"channels_last": True}], ids=str)
def test_what_is_judged_is_the_best_of_the_validated_steps(task, options):
    config = dataclasses.replace(CONFIG, **options)
    result = run_trial(config, KEY, task)
    plain = dataclasses.replace(config, best_weights=False)
    loop = Recorded(plain, KEY, task, *build_trial(plain, KEY, task))
    loop.outcomes = {}
    for _ in loop.points():
        pass
    assert list(loop.outcomes) == [3, 5, 6, 9, 10, 12, 15]  # every third step, and after each epoch
    step = max(loop.outcomes, key=lambda s: (loop.outcomes[s][0][0], -s))
    validation, test = loop.outcomes[step]
    assert result.best_step == step < 15
    assert (result.validation_score, result.validation_loss) == validation
    assert (result.test_score, result.test_loss) == test


def test_without_the_option_the_last_weights_are_judged_and_no_epoch_is_validated(task):
    result = run_trial(dataclasses.replace(CONFIG, best_weights=False), KEY, task)
    assert result.best_step is None
    assert result.validation_score == result.curve[-1].validation_score
    assert [p.examples // 16 for p in result.curve if p.validation_score is not None] == [3, 6, 9, 12, 15]


def test_a_run_that_diverges_after_its_best_is_a_diverged_run(task):
    result = run_trial(CONFIG, dataclasses.replace(KEY, method="none", lr=1e6), task)
    assert (result.state, result.test_score, result.best_step) == ("diverged", None, None)


def test_the_time_of_validating_is_part_of_the_time_of_the_run(task):
    result = run_trial(CONFIG, KEY, task)
    assert 0 < result.validation_seconds < result.seconds


@pytest.mark.parametrize(("amount", "expected"), [(0.1, 135), (0.2, 269), (47, 47)])
def test_the_validation_split_has_the_size_asked_for_and_every_class_its_share(amount, expected):
    data = load(StudyConfig(validation=amount)).data
    assert (len(data.validation), len(data.train)) == (expected, 1347 - expected)
    whole = torch.cat([data.validation.labels, data.train.labels]).bincount().double()
    assert (data.validation.labels.bincount() - whole * expected / 1347).abs().max() < 1


@pytest.mark.parametrize("amount", [0.0, -0.1, 1.5, float("nan")])
def test_a_validation_amount_that_means_nothing_is_refused(amount):
    with pytest.raises(StudyError, match=r"--validation .*share between 0 and 1, or a number"):
        validate(StudyConfig(validation=amount))


def test_a_validation_amount_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(StudyError, match=r"--validation 1347: .*1347 training examples"):
        load(StudyConfig(validation=1347))
