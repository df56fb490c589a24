"""Make the store of a study from its report, so that the study can be extended wherever its report is.

    python -m benchmarks.studies.restore docs/results/cifar10-resnet20.json

The folder of the report's command then holds every trial of it; the command with more methods, seeds or smaller batch
sizes runs what is new.
"""

import argparse
import json
import shlex
from pathlib import Path

from normkit.cli.main import parse
from normkit.study.compare import report
from normkit.study.config import OF_NAMED_DATA
from normkit.study.folder import STUDY_FILE, StudyFolder
from normkit.study.identity import study_name
from normkit.study.records import StudyRecord


def restore(results: Path, out: Path | None = None) -> Path:
    """Write the store of a study; trials that its report lacks wait in it.

    Args:
        results: The JSON of a report.
        out: Folder of the study; default that of its command.

    Returns:
        The folder.

    Raises:
        SystemExit: The folder holds a study already, or the report's command makes another study.
    """
    record = StudyRecord.from_dict(json.loads(results.read_text())["record"])
    command = parse(shlex.split(record.command)[1:])
    config = command.study.judged_by(record.metric.higher_is_better)
    kept = {name: value for name, value in config.to_dict().items() if name not in OF_NAMED_DATA}
    if other := [name for name, value in kept.items() if record.config.get(name, value) != value]:
        raise SystemExit(f"{results}: its command, {record.command}, makes another study ({', '.join(other)})")
    out = out or command.out or Path("runs") / study_name(config)
    if (out / STUDY_FILE).exists():
        raise SystemExit(f"{out} holds a study already; give another --out")
    folder = StudyFolder(out, config, record.command, None).prepare()
    store = folder.address(None).store()
    store.open(config)
    trials = {trial.key: trial for trial in record.trials}
    while (claim := store.claim()) is not None:
        if claim.key in trials:
            store.record(claim, trials[claim.key])
    facts = ("data", "model", "data_summary", "metric", "chance", "chance_loss")
    store.set_attr("data", {name: record.config[name] for name in facts})
    store.set_attr("grown", record.config.get("grown") or None)
    store.set_attr("environment", record.environment)
    store.set_attr("costs", [vars(cost) for cost in record.costs])
    folder.save()
    report(folder, store)
    return out


def main() -> None:
    """Restore one study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON of a report")
    parser.add_argument("--out", type=Path, help="folder of the study; default that of its command")
    options = parser.parse_args()
    print(restore(options.results, options.out))


if __name__ == "__main__":
    main()
