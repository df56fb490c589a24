"""The command line: what a stranger types, right and wrong."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import normkit
from normkit.cli.main import main
from normkit.study.errors import StudyError
from normkit.study.folder import StudyFolder
from normkit.study.report.render import read_results

QUICK = [
    "--methods",
    "batch,none",
    "--batch-sizes",
    "32",
    "--seeds",
    "2",
    "--budget",
    "96",
    "--lr-points",
    "2",
    "--lr-extend",
    "0",
    "--quiet",
]

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def run(*arguments):
    """The exit code of the command in this process."""
    return main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "out"
    assert run("compare", *QUICK, "--out", folder) == 0
    return folder


@pytest.mark.slow
def test_compare_writes_a_report_that_holds_everything(study):
    assert {"report.html", "report.md", "results.json", "trials.csv", "study.json"} <= {p.name for p in study.iterdir()}
    record = read_results(study / "results.json")
    assert len(record.trials) == record.planned == 2 * (2 + 2)
    assert {t.state for t in record.trials} == {"finished"}
    assert all(t.test_score is not None for t in record.trials if t.key.phase == "final")
    assert {(c.method, c.batch_size) for c in record.costs} == {("batch", 32), ("none", 32)}
    assert next(c for c in record.costs if c.method == "batch").step_ratio == 1.0
    assert record.command.startswith("normkit compare --methods batch,none")
    assert record.environment["torch"]


@pytest.mark.slow
def test_the_same_command_runs_nothing_again(study):
    before = read_results(study / "results.json").trials
    assert run("compare", *QUICK, "--out", study) == 0  # results equal in their wall times too: they are the same runs
    assert read_results(study / "results.json").trials == before


@pytest.mark.slow
def test_report_is_made_again_from_the_store(study):
    before = (study / "report.html").read_bytes()
    (study / "report.html").unlink()
    assert run("report", study) == 0
    assert (study / "report.html").read_bytes() == before


@pytest.mark.slow
def test_a_report_is_not_replaced_by_an_empty_one_when_the_trials_are_gone(study, tmp_path, capsys):
    for name in ("study.json", "report.md"):
        (tmp_path / name).write_bytes((study / name).read_bytes())
    assert run("report", tmp_path) == 2
    assert "does not hold the trials" in capsys.readouterr().err
    assert (tmp_path / "report.md").read_bytes() == (study / "report.md").read_bytes()


@pytest.mark.slow
def test_a_terminal_without_unicode_gets_the_report_and_errors(study):
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}

    def in_ascii(*arguments):
        command = [sys.executable, "-m", "normkit", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    done = in_ascii("report", study)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"report: {study / 'report.html'}" in done.stdout
    refused = in_ascii("compare", "--seeds", "many")
    assert refused.returncode == 2
    assert "Error parsing --seeds" in refused.stderr


@pytest.mark.slow
def test_another_configuration_in_the_same_folder_is_refused(study, capsys):
    changed = [*QUICK[:-1], "--momentum", "0.5", "--out", study]
    assert run("compare", *changed) == 2
    assert "momentum: kept 0.9, given 0.5" in capsys.readouterr().err
    assert StudyFolder.read(study).config.momentum == 0.9


def listed(capsys, *options):
    assert run("recipes", *options) == 0
    return [line.split()[0] for line in capsys.readouterr().out.splitlines() if re.match(r"  \S", line)]


def test_recipes_are_listed_in_groups_with_their_papers(capsys):
    assert run("recipes") == 0
    text = capsys.readouterr().out
    assert "arXiv 1502.03167" in text
    assert "\nFilters on the unit sphere:\n  sgd-g " in text
    assert sorted(listed(capsys)) == sorted(name for name, recipe in normkit.recipes().items() if not recipe.ablation)
    assert sorted(listed(capsys, "--all")) == sorted(normkit.recipes())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--methods", "bach"], "--methods: unknown method 'bach'; did you mean 'batch'"),
        (["compare", "--methods", ","], "--methods is empty"),
        (["compare", "--batch-sizes", "0"], "--batch-sizes: 0 is not a batch size"),
        (["compare", "--batch-sizes", "1200", "--budget", "2000"], "larger than the training split of 1078"),
        (["compare", "--lr", "-1"], "--lr -1"),
        (["compare", "--lr", "none=0.1"], "--lr: rates for none; give one for each of none, batch"),
        (["compare", "--validation", "2.5"], "--validation 2.5: give a share"),
        (["compare", "--validation", "1347"], "--validation 1347: "),
        (["compare", "--seeds", "0"], "--seeds 0: give at least 1"),
        (["compare", "--primary", "batch"], "--primary: batch is the reference"),
        (["compare", "--primary", "bmp"], "--primary: 'bmp' is not planned; did you mean 'bnp'?"),
        (["compare", "--methods", "batch,none", "--primary", "bnp"], "choose from none, or add it to --methods"),
        (["compare", "--primary", "bnp,none,bnp"], "--primary bnp,none,bnp: name each method once"),
        (["compare", "--margin", "0"], "--margin 0.0: give a positive number"),
        (["compare", "--workers", "-1"], "--workers -1"),
        (["compare", "--budget", "-5"], "--budget -5: give at least 1"),
        (["compare", "--model", "torch:nonsense"], "has no callable 'nonsense'"),
        (["compare", "--device", "banana"], "--device banana: cannot be used here"),
        (["compare", "--model", "digits-cn"], "did you mean 'digits-cnn'"),
        (["compare", "--model", "no.module:factory"], "no.module"),
        (["compare", "--data", "no/such/folder"], "--data"),
        (["compare", "--data", "digts"], "did you mean 'digits'?"),
        (
            ["compare", "--data", "spiral", "--model", "digits-cnn", "--methods", "batch"],
            "--model: model 'digits-cnn' takes images",
        ),
        (["compare", "--device", "xpu:9"], "--device xpu:9: cannot be used here"),
        (["compar"], "did you mean 'compare'"),
        (["compare", "--data", ""], "data '' is no name"),
        (["report", "/nonexistent"], "holds no study"),
        (["worker", "--storage", "sqlite:///none.db", "--workers", "-1"], "--workers -1: give at least 1"),
        (
            ["doctor", "--batch-size", "100000"],
            "--batch-size 100000: is larger than the training split of 1347 examples",
        ),
        (["doctor", "--device", "xpu:9"], "--device xpu:9: cannot be used here"),
        (["doctor", "--checkpoint", __file__], "cannot be read"),
    ],
)
def test_bad_input_is_one_line_with_exit_code_2(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []  # nothing was begun


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--batch-sizes", "64,x"], "Error parsing --batch-sizes: 'x' is not a whole number"),
        (["compare", "--lr", "fast"], "Error parsing --lr: 'fast' is not a number"),
        (["compare", "--lr", "none=fast"], "Error parsing --lr: 'fast' is not a number"),
        (["compare", "--limit", "2.5"], "Error parsing --limit: '2.5' is not a whole number"),
        (["compare", "--seeds", "many"], "Error parsing --seeds"),
        (["compare", "--metods", "batch"], "--methods"),
        (["doctor", "--checkpoint"], "--checkpoint"),
    ],
)
def test_arguments_that_cannot_be_parsed_are_explained_with_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(*arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["recipes"],
        ["recipes", "--json"],
        ["compare", "--help"],
        ["compare", "--seeds", "x"],
        ["compare", "--seeds", "0"],
        ["compare", "--methods", "bach"],
        ["doctor", "--method", "bach"],
        ["x"],
    ],
)
def test_torch_is_loaded_by_what_computes_alone(arguments):
    script = (
        "import sys\nfrom normkit.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    assert 'torch' not in sys.modules, 'torch'"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert "AssertionError" not in done.stderr


def test_a_storage_that_does_not_open_leaves_nothing_behind(tmp_path, capsys):
    url = "postgresql+psycopg2://me:hunter2@127.0.0.1:1/none"
    assert run("compare", *QUICK, "--out", tmp_path / "out", "--storage", url) == 2
    assert "hunter2" not in capsys.readouterr().err
    assert not (tmp_path / "out" / "study.json").exists()


@pytest.mark.slow
def test_a_study_moved_to_another_storage_is_refused(study, tmp_path, capsys):
    assert run("compare", *QUICK, "--out", study, "--storage", f"sqlite:///{tmp_path / 'other.db'}") == 2
    assert "the folder's own file" in capsys.readouterr().err


@pytest.mark.slow
def test_output_that_nobody_reads_is_no_error():
    command = f"{sys.executable} -m normkit recipes | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("--version")
    assert capsys.readouterr().out.startswith("normkit ")


def test_a_dry_run_shows_the_plan_and_leaves_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("compare", *QUICK, "--dry-run") == 0
    out, errors = capsys.readouterr()
    assert "8 trials: 4 to search learning rates, 4 final" in out
    assert "about " in out
    assert errors == ""
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(capsys, tmp_path):
    assert run("compare", "--methods", "bach", "--out", tmp_path / "x", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("body", ["raise OSError('no disk')", "return 3", "return nn.Linear(64, 3)"])
def test_a_models_factory_that_misbehaves_is_named(body, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(f"from torch import nn\ndef build(input_shape, classes):\n    {body}\n")
    assert run("compare", "--model", f"{file}:build", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "--model" in error
    assert "mine.py:build" in error


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("compare", *QUICK, "--out", tmp_path / "file" / "out") == 2
    assert "--out" in capsys.readouterr().err


def test_a_worker_on_a_storage_without_a_study_says_so(tmp_path, capsys):
    assert run("worker", "--storage", f"sqlite:///{tmp_path}/mistyped.db") == 2
    assert "holds no study; give what `normkit compare --storage` was given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--momentum", "5"], "--momentum 5.0: give a number in [0, 1)"),
        (["--weight-decay", "nan"], "--weight-decay nan: give a number"),
        (["--device", "xpu:9"], "--device xpu:9: cannot be used here"),
    ],
)
def test_bad_input_to_landscape_is_one_line(arguments, message, capsys, tmp_path):
    assert run("landscape", *arguments, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_landscape_trains_nothing_before_it_knows_that_it_can_write(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert run("landscape", "--out", tmp_path / "file") == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'file'}: File exists\n"


@pytest.mark.parametrize(
    ("command", "stopped", "told"),
    [
        (["reproduce", "bnp-mlp"], "normkit.study.papers.reproduce.reproduce", "the same command resumes"),
        (["doctor"], "normkit.study.doctor.run_doctor", "stopped"),
        (["landscape"], "normkit.study.landscape.run.run_landscape", "stopped"),
    ],
)
def test_ctrl_c_ends_every_command_without_a_traceback(command, stopped, told, monkeypatch, tmp_path, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stopped, interrupted)
    assert run(*command) == 130
    assert told in capsys.readouterr().err


def test_a_damaged_study_file_is_named(tmp_path, capsys):
    (tmp_path / "study.json").write_text("{")
    assert run("report", tmp_path) == 2
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_a_users_model_and_data_are_compared(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def data():\n"
        "    g = torch.Generator().manual_seed(0)\n"
        "    def split(n):\n"
        "        y = torch.arange(n) % 3\n"
        "        return torch.randn(n, 5, generator=g) + y[:, None], y\n"
        "    return split(90), None, split(30)\n"
        "def model(input_shape, classes):\n"
        "    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, classes))\n"
    )
    mine = tmp_path / "mine.py"
    assert run("compare", "--data", f"{mine}:data", "--model", f"{mine}:model", *QUICK, "--out", tmp_path / "out") == 0
    record = read_results(tmp_path / "out" / "results.json")
    assert {t.state for t in record.trials} == {"finished"}


@pytest.mark.slow
def test_a_method_that_cannot_run_at_a_batch_size_says_so_and_the_study_goes_on(tmp_path):
    out = tmp_path / "out"
    assert (
        run(
            *(
                "compare",
                "--data",
                "spiral",
                "--model",
                "mlp",
                "--methods",
                "batch,none",
                "--batch-sizes",
                "1",
                "--seeds",
                "2",
            ),
            *("--budget", "64", "--lr-points", "2", "--landscape", "--quiet", "--out", out),
        )
        == 0
    )
    record = read_results(out / "results.json")
    assert [trace["method"] for trace in record.landscape] == ["none"]
    finals = [t for t in record.trials if t.key.phase == "final"]
    assert {t.state for t in finals if t.key.method == "none"} == {"finished"}
    assert {t.state for t in finals if t.key.method == "batch"} == {"failed"}
    assert all("more than 1 value per channel" in t.error for t in finals if t.key.method == "batch")


@pytest.mark.slow
def test_importing_normkit_is_quick_and_needs_torch_alone():
    code = (
        "import sys, time, torch, torch.fx; start = time.process_time(); import normkit; took = time.process_time() - start\n"
        "extras = {'sklearn', 'datasets', 'optuna', 'scipy', 'tyro', 'rich', 'matplotlib', 'jinja2'} & set(sys.modules)\n"
        "assert not extras, extras\nprint(took)"
    )
    took = [
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, env=ENVIRONMENT)
        for _ in range(3)
    ]
    assert min(float(process.stdout) for process in took) < 0.15


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "out"
    listening = (  # a shell's background jobs, and with them this test, may have been told to ignore Ctrl-C
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from normkit.cli.main import main; sys.exit(main())"
    )
    command = [
        sys.executable,
        "-c",
        listening,
        "compare",
        *QUICK,
        "--budget",
        "20000",
        "--workers",
        "1",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True)
    running = []
    while not running and process.poll() is None:
        time.sleep(0.2)
        with contextlib.suppress(StudyError, KeyError):  # before the study is there
            folder = StudyFolder.read(out)
            store = folder.address(None).store()
            running = store.running()
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: the workers get it too
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "the same command resumes" in errors
    assert "Traceback" not in errors
    assert (out / "report.html").exists()
    store.open(folder.config)
    assert not store.running()  # the worker gave its trial back
