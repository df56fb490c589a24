"""A reader, and a kill at any moment, meets the former file or the new one, never a part."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from normkit.study.files import new_folder, write_file
from normkit.study.report.render import read_results, write_report
from tests.study.report.fake_study import realistic


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "report.html"
    write_file(file, "before")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(file, "after")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.html", "before")]


def test_the_rights_of_a_file_are_those_of_any_new_one(tmp_path):
    write_file(tmp_path / "ours", "x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_every_file_of_a_report_goes_through_it(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("normkit.study.report.render.write_file", lambda path, text: written.append(path.name))
    write_report(realistic(), tmp_path)
    assert sorted(written) == ["report.html", "report.md", "results.json", "trials.csv"]
    assert not list(tmp_path.iterdir())


def test_a_folder_made_for_a_run_that_fails_goes_again(tmp_path):
    with pytest.raises(ValueError, match="no such method"), new_folder(tmp_path / "a" / "b"):
        raise ValueError("no such method")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_stays(tmp_path):
    def fail_late():
        with new_folder(tmp_path / "a"):
            (tmp_path / "a" / "kept").write_text("x")
            raise ValueError("late")

    with pytest.raises(ValueError, match="late"):
        fail_late()
    assert (tmp_path / "a" / "kept").exists()


def write_on(folder):
    record = realistic()
    while True:
        write_report(record, folder)


@pytest.mark.slow
def test_reports_that_are_read_while_they_are_written_and_whose_writer_is_killed_are_whole(tmp_path):
    write_report(realistic(), tmp_path)
    context = multiprocessing.get_context("spawn")
    for wait in (0.3, 1.1, 2.3):
        writer = context.Process(target=write_on, args=(tmp_path,), daemon=True)
        writer.start()
        end = time.monotonic() + 5 + wait
        while time.monotonic() < end:
            assert read_results(tmp_path / "results.json").trials
            assert (tmp_path / "report.html").read_text().rstrip().endswith("</html>")
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        json.loads((tmp_path / "results.json").read_text())
        assert (tmp_path / "report.html").read_text().rstrip().endswith("</html>")
