"""What makes a study this one: its name, its configuration as it is kept, and the versions that may read it.

A study is named by the options that differ from their defaults and by the revisions of its methods, so that an option that a
later version adds does not rename it. A default is therefore part of that name: one that changes renames the studies that use it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from normkit import __version__
from normkit._apply import recipes
from normkit.study.config import StudyConfig
from normkit.study.errors import StudyError
from normkit.study.methods import parse_method

FORMAT = 3  # of kept studies; 1 kept every option, and no format
_FORMER_DEFAULTS = {"model": "digits-cnn"}  # up to format 2
_FORMER_SEARCH = {"lr_points": 5, "lr_extend": 0}
_FIRST_OPTIONS = {"data", "model", "methods", "batch_sizes"}  # every configuration of format 1 has them


def study_name(config: StudyConfig) -> str:
    """Name of the study in its storage: equal configurations meet, different ones never do.

    Examples:
        >>> study_name(StudyConfig()) == study_name(StudyConfig()) != study_name(StudyConfig(seeds=4))
        True
    """
    return f"{_words(config)}-{_digest([_options(config), _revisions(config.methods)])}"


def pack(config: StudyConfig) -> dict[str, Any]:
    """The configuration as it is kept, JSON-ready: options that differ from their defaults, revisions other than 1."""
    return {
        "format": FORMAT,
        "version": __version__,
        "options": _options(config),
        "revisions": _revisions(config.methods),
    }


def unpack(kept: Any, where: str, *, resume: bool = True) -> StudyConfig:
    """The configuration that was kept, by this version or an earlier one.

    Args:
        kept: What ``pack`` returned, or its JSON.
        where: Where it is kept, for the message.
        resume: Whether more is to be trained; what has ended can be reported by any version.

    Raises:
        StudyError: A newer version kept it, one of its methods has changed since, or it is no configuration.
    """
    try:
        kept = json.loads(kept) if isinstance(kept, str) else kept
        if "format" in kept:
            version, form = kept.get("version", ""), int(kept["format"])
            options, revisions = dict(kept["options"]), dict(kept["revisions"])
        else:
            version, form, options, revisions = "", 1, dict(kept), {}
            for option in _FIRST_OPTIONS:
                options[option]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise StudyError(f"{where}: its configuration is damaged ({error}); give another --out or --study") from error
    unknown = sorted(options.keys() - {field.name for field in fields(StudyConfig)})
    if form > FORMAT or unknown:
        made = f"normkit {version}" if version else "another version of normkit"
        what = f"the option {unknown[0]}" if unknown else f"format {form}"
        raise StudyError(f"{where}: was made by {made} with {what}, which {__version__} does not know; update normkit")
    if form < 3:
        searched = options.get("lr", "auto") == "auto"
        options = _FORMER_DEFAULTS | (_FORMER_SEARCH if searched else {}) | options
    config = StudyConfig.from_dict(options)
    if resume and revisions != (now := _revisions(config.methods)):
        changed = sorted(m for m in {*revisions, *now} if revisions.get(m, 1) != now.get(m, 1))
        raise StudyError(
            f"{where}: {', '.join(changed)} trained otherwise when it began (normkit {version or '0.1'}), and its results would "
            "be mixed; give another --out, or use that version"
        )
    return config


def former_name(options: dict[str, Any], config: StudyConfig) -> str:
    """The name that a study of format 1 has in its storage."""
    return f"{_words(config)}-{_digest(options)}"


def extends(given: StudyConfig, kept: StudyConfig) -> bool:
    """Return whether ``given`` is ``kept`` with more methods, seeds or batch sizes: it has every trial of ``kept`` as it was.

    A batch size above the largest is no extension, since samples are evaluated in batches of that size; nor is another
    reference, since what is claimed was compared with the former. The order of methods and sizes is that of the report alone.

    Examples:
        >>> kept = StudyConfig(methods=("batch", "group"), batch_sizes=(8,), seeds=3)
        >>> extends(replace(kept, methods=("batch", "bnp", "group"), seeds=5), kept), extends(kept, replace(kept, seeds=5))
        (True, False)
    """
    rates = kept.lr
    if isinstance(given.lr, dict) and isinstance(kept.lr, dict):
        rates = {**given.lr, **kept.lr}
    grown = replace(kept, methods=given.methods, seeds=given.seeds, batch_sizes=given.batch_sizes, lr=rates)
    return (
        grown == given
        and given.seeds >= kept.seeds
        and {*given.methods} >= {*kept.methods}
        and {*given.batch_sizes} >= {*kept.batch_sizes}
        and max(given.batch_sizes) == max(kept.batch_sizes)
        and given.reference == kept.reference
    )


def difference(kept: StudyConfig, given: StudyConfig) -> str:
    """Return the differences of two configurations as an error message."""
    old, new = kept.to_dict(), given.to_dict()
    changes = "; ".join(f"{key}: kept {old[key]}, given {new[key]}" for key in sorted(old) if old[key] != new[key])
    if kept.reference != given.reference:
        changes += f"; the reference: kept {kept.reference}, given {given.reference}"
    return (
        f"--out holds a study with another configuration ({changes}); give another --out, or the kept values (methods, seeds and "
        "smaller batch sizes may be added)"
    )


def _options(config: StudyConfig) -> dict[str, Any]:
    defaults = StudyConfig().to_dict()
    return {key: value for key, value in config.to_dict().items() if value != defaults[key]}


def _revisions(methods: Sequence[str]) -> dict[str, int]:
    known = {m: recipes()[name].revision for m in methods if (name := parse_method(m)[0]) in recipes()}
    return {m: revision for m, revision in known.items() if revision != 1}


def _words(config: StudyConfig) -> str:
    places = [config.task] if config.task is not None else [config.data, config.model]
    words = "-".join(Path(place).name for place in places)
    return "".join(c if c.isalnum() else "-" for c in words).strip("-")


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
