"""Tasks of what people have: the loss and the score are those of their own trainers."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pl = pytest.importorskip("lightning.pytorch", reason="needs Lightning")
transformers = pytest.importorskip("transformers", reason="needs transformers")

from normkit.integrations import huggingface, lightning  # noqa: E402
from normkit.study.check import check  # noqa: E402
from normkit.study.config import StudyConfig  # noqa: E402
from normkit.study.records import TrialKey  # noqa: E402
from normkit.study.train.trial import run_trial  # noqa: E402

CONFIG = StudyConfig(task="own", methods=("batch", "none"), batch_sizes=(4,), budget=24, lr=0.05)
KEY = TrialKey("final", "batch", 4, 0.05, 0)
X = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


class Module(pl.LightningModule):
    def __init__(self, manual=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        self.automatic_optimization = not manual

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return {"loss": loss}

    def validation_step(self, batch, index):
        self.log_dict({"val_acc": (self(batch[0]).argmax(1) == batch[1]).float().mean()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(pl.LightningDataModule):
    def _loader(self, start, stop):
        return DataLoader(TensorDataset(X[start:stop], Y[start:stop]), batch_size=4)

    def train_dataloader(self):
        return self._loader(0, 16)

    def val_dataloader(self):
        return self._loader(16, 23)

    def test_dataloader(self):
        return self._loader(23, 30)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of Lightning itself
def test_the_score_of_a_lightning_task_is_what_its_trainer_logs():
    task = lightning.task(Module, Data(), monitor="val_acc", unit="%")
    assert (task.metric, task.higher_is_better, task.name) == ("acc", True, "Module")
    model = task.model().eval()
    with torch.no_grad():
        score, _ = task.evaluate(model, task.evaluation_batches("validation", device="cpu", most=4))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    (logged,) = pl.Trainer(**quiet, enable_checkpointing=False).validate(model, Data(), verbose=False)
    assert score == pytest.approx(logged["val_acc"])  # batches of 4 and 3 weigh by their samples
    assert run_trial(CONFIG, KEY, check(CONFIG, task)).state == "finished"


@pytest.mark.parametrize(
    ("module", "monitor", "message"),
    [
        (Module(), "val_acc", "a Module that exists already; give the class"),
        (lambda: Module(manual=True), "val_acc", "optimizes by hand"),
    ],
)
def test_a_module_that_makes_no_task_is_told(module, monitor, message):
    with pytest.raises(ValueError, match=message):
        lightning.task(module, Data(), monitor)


def test_a_name_that_is_not_logged_is_told_with_those_that_are():
    task = lightning.task(Module, Data(), monitor="val_dice")
    with pytest.raises(ValueError, match=r"did not log 'val_dice' \(it logged val_acc\)"):
        check(CONFIG, task)


class Net(transformers.PreTrainedModel):
    config_class = transformers.PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.net = nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x=None, labels=None):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def test_the_score_of_a_hugging_face_task_is_what_its_trainer_evaluates(tmp_path):
    samples = [{"x": x, "labels": y, "unused": "text"} for x, y in zip(X, Y, strict=True)]
    known = [{"x": s["x"], "labels": s["labels"]} for s in samples]
    arguments = transformers.TrainingArguments(tmp_path, report_to=[], use_cpu=True, per_device_eval_batch_size=4)
    trainer = transformers.Trainer(
        Net(transformers.PretrainedConfig()), arguments, train_dataset=known[:16], eval_dataset=known[16:23]
    )
    trainer.compute_metrics = accuracy
    task = huggingface.task(trainer, test=samples[23:], metric="accuracy", unit="%")
    model = task.model().eval()
    with torch.no_grad():
        score, _ = task.evaluate(model, task.evaluation_batches("validation", device="cpu", most=4))
    assert score == pytest.approx(trainer.evaluate()["eval_accuracy"])
    assert run_trial(CONFIG, KEY, check(CONFIG, task)).state == "finished"
