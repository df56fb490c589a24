"""The output folder of a study: its configuration, and where its trials are kept."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy.engine import URL, make_url

from normkit.study.config import StudyConfig
from normkit.study.errors import StudyError
from normkit.study.files import write_file
from normkit.study.identity import difference, extends, former_name, pack, study_name, unpack
from normkit.study.store.worker import StoreAddress, lock_file

STUDY_FILE = "study.json"
CHECKPOINTS = "checkpoints"
STORAGE_VARIABLE = "NORMKIT_STORAGE"


@dataclass(frozen=True)
class StudyFolder:
    """The output folder of one study: its configuration, and where its trials are kept.

    Attributes:
        path: The folder.
        config: Configuration of the study.
        command: The command that made it, credentials redacted.
        storage: URL of the storage, credentials redacted; None for the SQLite file in the folder.
        kept_name: Name that the study has in its storage since it began; None before that.
    """

    path: Path
    config: StudyConfig
    command: str
    storage: str | None
    kept_name: str | None = None

    @property
    def name(self) -> str:
        """Name of the study in its storage."""
        return self.kept_name or study_name(self.config)

    def prepare(self) -> "StudyFolder":
        """Make the folder; if it holds a study already, check that it is the same one, or that this one extends it.

        Returns:
            This folder, with the name that its study has.

        Raises:
            StudyError: The folder cannot be written, no URL can name it, or it holds another study, or the same one in another
                storage.
        """
        if self.storage is None:
            self._url()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(f"--out {self.path}: cannot be made ({error.strerror}); give another folder") from error
        if not (self.path / STUDY_FILE).exists():
            return self
        kept = StudyFolder.read(self.path)
        if kept.config != self.config and not extends(self.config, kept.config):
            raise StudyError(difference(kept.config, self.config))
        if kept.storage != self.storage:
            places = [storage or "the folder's own file" for storage in (kept.storage, self.storage)]
            raise StudyError(
                f"--storage: the trials of {self.path} are in {places[0]}, not in {places[1]}; give that, or another --out"
            )
        return replace(self, kept_name=kept.kept_name)

    def save(self) -> None:
        """Write ``study.json``, unless it is there and says the same.

        Raises:
            StudyError: The folder cannot be written.
        """
        file = self.path / STUDY_FILE
        if file.exists() and StudyFolder.read(self.path).config == self.config:
            return
        text = {"name": self.name, "study": pack(self.config), "command": self.command, "storage": self.storage}
        try:
            write_file(file, json.dumps(text, indent=2) + "\n")
        except OSError as error:
            raise StudyError(f"--out {self.path}: cannot be written ({error.strerror}); give another folder") from error

    @staticmethod
    def read(path: Path, *, resume: bool = True) -> "StudyFolder":
        """Read ``study.json`` of a folder.

        Args:
            path: The folder.
            resume: Whether more is to be trained there.

        Raises:
            StudyError: There is none, it is damaged, or another version made it that this one cannot resume.
        """
        file = path / STUDY_FILE
        try:
            text = json.loads(file.read_text(encoding="utf-8"))
            kept = text["study"] if "study" in text else text["config"]
            command, storage = str(text["command"]), text["storage"]
            storage, name = None if storage is None else str(storage), text.get("name")
        except FileNotFoundError as error:
            raise StudyError(
                f"{path} holds no study (no {STUDY_FILE}); give a folder that `normkit compare` wrote"
            ) from error
        except OSError as error:
            raise StudyError(f"{file}: cannot be read ({error.strerror}); check the rights") from error
        except (ValueError, KeyError, TypeError) as error:
            raise StudyError(f"{file}: is damaged ({error}); remove it and give the command again") from error
        config = unpack(kept, str(file), resume=resume)
        name = name or (study_name(config) if "study" in text else former_name(kept, config))
        return StudyFolder(path, config, command, storage, name)

    def _url(self) -> str:
        # Of the SQLite file in the folder.
        file = str(self.path / "study.db")
        url = URL.create("sqlite", database=file).render_as_string()  # "?" and "%" quoted by SQLAlchemy from 2.1 on
        if make_url(url).database != file:
            raise StudyError(
                f"--out {self.path}: SQLAlchemy before 2.1 cannot open files there; give a path without '?'"
            )
        return url

    def address(self, storage: str | None) -> StoreAddress:
        """Return where the trials are kept, given the storage's full URL if it is not in the folder.

        Raises:
            StudyError: The storage has a password, which is kept nowhere, and was not given; or no URL can name the folder.
        """
        if self.storage is None and storage is None:
            url = self._url()
            return StoreAddress(url, self.name, lock_file(url), self.path / CHECKPOINTS)
        url = storage or os.environ.get(STORAGE_VARIABLE) or self.storage or ""
        if "***" in url:
            raise StudyError(
                f"--storage: the trials are in {url}, and its password is kept nowhere; give the URL with --storage or in the "
                f"environment variable {STORAGE_VARIABLE}"
            )
        return StoreAddress(url, self.name, lock_file(url), self.path / CHECKPOINTS)
