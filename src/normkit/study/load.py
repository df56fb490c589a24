"""The task of a study, loaded from its configuration."""

from normkit.study.classification import load_classification
from normkit.study.config import StudyConfig
from normkit.study.task import Task


def load(config: StudyConfig) -> Task:
    """The task of a study, with a validation split.

    Raises:
        DataError: The data cannot be used.
        StudyError: It leaves no sample to train or to validate on.
    """
    return load_classification(config)
