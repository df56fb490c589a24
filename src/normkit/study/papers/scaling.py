"""Presets: a paper's comparisons as studies, in two arms, and at a share of their size.

Every preset trains by the paper's protocol (network, optimizer, schedule, batch sizes, number of runs). In the fair arm each
method gets a learning rate of its own, picked on a validation split from a grid of the same size. In the paper's the
rates are fixed, where they are known; they were not always like for like.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from normkit.study.config import StudyConfig
from normkit.study.plan import slots

SMALLEST_BUDGET, SMALLEST_LIMIT = 512, 1000


@dataclass(frozen=True)
class Comparison:
    """One comparison of a table.

    Attributes:
        label: What the paper calls it.
        config: The study at the paper's size.
        published: Method -> test accuracy in percent, as published, at the only batch size.
        rates: The methods of the paper's arm -> the paper's learning rates; empty where none is known.
    """

    label: str
    config: StudyConfig
    published: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Preset:
    """One table or figure of a paper.

    Attributes:
        summary: What it shows.
        paper: Authors, year, arXiv number.
        comparisons: Its studies.
        note: What a reader must know beside the figures.
    """

    summary: str
    paper: str
    comparisons: tuple[Comparison, ...]
    note: str = ""

    @property
    def runs(self) -> int:
        """Training runs at the paper's size, searches for learning rates included."""
        return sum(len(slots(comparison.config)) for comparison in self.comparisons)

    @property
    def examples(self) -> int:
        """Training examples seen by all of them together."""
        return sum(len(slots(comparison.config)) * comparison.config.budget for comparison in self.comparisons)

    def at_paper_rates(self) -> "Preset | None":
        """The paper's arm: its learning rates in place of the search; None where they are not known."""
        if not all(comparison.rates for comparison in self.comparisons):
            return None

        def fixed(comparison: Comparison) -> Comparison:
            return replace(
                comparison,
                config=replace(comparison.config, methods=tuple(comparison.rates), lr=dict(comparison.rates)),
            )

        return replace(self, comparisons=tuple(map(fixed, self.comparisons)))

    def on(self, model: str) -> "Preset | None":
        """The same on one network: the comparisons that have it, or, where all share one network, that one in its place.

        None where neither is possible. Published figures are kept for the paper's own networks only.
        """
        kept = tuple(
            comparison for comparison in self.comparisons if model in {comparison.config.model, comparison.label}
        )
        if kept or len({comparison.config.model for comparison in self.comparisons}) > 1:
            return replace(self, comparisons=kept) if kept else None
        return replace(
            self,
            comparisons=tuple(
                Comparison(
                    comparison.label.replace(comparison.config.model, model),
                    replace(comparison.config, model=model),
                    rates=comparison.rates,
                )
                for comparison in self.comparisons
            ),
        )


def scaled(config: StudyConfig, scale: float) -> tuple[StudyConfig, dict[str, str]]:
    """A study at a share of its size, and what was scaled down, in words.

    The budget shrinks by ``scale``, and leaves no last batch of one sample; seeds and searched rates shrink to what a first look
    needs; batch sizes that would make fewer than 16 steps are left out; of each split no more is used than training and a fair
    evaluation need.

    Args:
        config: The study at the paper's size.
        scale: Share of the budget, in (0, 1].

    Returns:
        The study, and by field what changed.

    Examples:
        >>> small, changes = scaled(StudyConfig(budget=1_000_000, batch_sizes=(128, 8), seeds=15), 0.001)
        >>> small.budget, small.batch_sizes, small.seeds, changes["budget"]
        (1000, (8,), 2, '1,000 of 1,000,000 training examples a run')
    """
    if scale == 1:
        return config, {}
    budget = min(config.budget, max(SMALLEST_BUDGET, round(config.budget * scale)))
    while any(size > 1 and budget % size == 1 for size in config.batch_sizes):  # a last batch of one sample
        budget -= 1
    sizes = tuple(size for size in config.batch_sizes if 16 * size <= budget) or (min(config.batch_sizes),)
    seeds = min(config.seeds, max(2, round(config.seeds * scale)))
    limit = max(SMALLEST_LIMIT, 2 * budget)
    points = 3 if config.lr == "auto" else config.lr_points
    changes = {
        "budget": f"{budget:,} of {config.budget:,} training examples a run",
        "seeds": f"{seeds} of {config.seeds} seeds",
        "limit": f"at most {limit:,} examples of each split",
    }
    if points != config.lr_points:
        changes["lr_points"] = f"{points} of {config.lr_points} learning rates"
    if sizes != config.batch_sizes:
        changes["batch_sizes"] = (
            f"batch sizes {', '.join(map(str, sizes))} of {', '.join(map(str, config.batch_sizes))}"
        )
    small = replace(config, budget=budget, batch_sizes=sizes, seeds=seeds, lr_points=points, limit=limit)
    return small, changes
