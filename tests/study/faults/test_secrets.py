"""No secret of a storage's URL is written or printed, wherever in the URL it is."""

import pytest

from normkit.cli.main import main
from normkit.study.environment import command_line, redact
from normkit.study.errors import StudyError
from normkit.study.store.store import Store

SECRET = "hunter2%2Fx"
URLS = [
    f"postgresql+psycopg2://me:{SECRET}@127.0.0.1:1/none",
    f"postgresql+psycopg2://me@127.0.0.1:1/none?password={SECRET}",
    f"postgresql+psycopg2://127.0.0.1:1/none?user=me&sslmode=require&sslpassword={SECRET}",
    f"postgresql+psycopg2://me@127.0.0.1:1/none?passfile={SECRET}",
    f"mysql://me@127.0.0.1:1/none?ssl_key={SECRET};token={SECRET}",
    f"postgresql+psycopg2://me:{SECRET}@127.0.0.1:port/none",
]


@pytest.mark.parametrize("url", URLS)
def test_a_secret_is_redacted_in_a_command_an_error_and_a_text_that_repeats_it(url):
    with pytest.raises(StudyError) as caught:
        Store(url, "test")
    texts = [
        command_line(["compare", "--storage", url]),
        command_line([f"--storage={url}"]),
        redact(url),
        str(caught.value),
    ]
    texts.append(redact(f"no login with {SECRET} or hunter2/x", url))
    assert not [text for text in texts if "hunter2" in text]


def test_what_is_known_to_be_harmless_stays():
    url = "postgresql://host/db?sslmode=require&connect_timeout=5"
    assert redact(url) == url


@pytest.mark.parametrize("url", [f"sqlite:///FOLDER/study.db?timeout=60&password={SECRET}"])
def test_no_file_of_a_study_and_no_line_of_a_command_holds_a_secret(url, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("normkit.study.compare.run_workers", lambda *_: None)
    monkeypatch.setattr("normkit.study.compare.measure_costs", lambda *_: [])
    url = url.replace("FOLDER", str(tmp_path))
    out = tmp_path / "out"
    main(["compare", "--methods", "batch", "--batch-sizes", "8", "--budget", "8", "--storage", url, "--out", str(out)])
    printed = capfd.readouterr()
    assert "hunter2" not in printed.out + printed.err
    assert not [path for path in out.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
