"""A plan: methods x learning rates x batch sizes x seeds, and what may run when.

Every method gets, at every batch size, the same number of learning rates on a grid around its recipe's own centre, tried
with seeds that the final runs do not use and judged on a validation split. While the best one lies at an end of the grid, the
grid grows there, by the same rule for all; the final runs then use the best one.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from normkit.study.config import OF_NAMED_DATA, StudyConfig
from normkit.study.errors import StudyError
from normkit.study.records import Phase, TrialKey, TrialResult

SEARCH_SEED = 1_000_000  # search seeds count from here, final seeds from 0: they never meet
GRID_STEP = math.sqrt(10.0)
MOST = {"--seeds": 10_000, "--search-seeds": 10_000, "--lr-points": 50, "--lr-extend": 50, "--image-size": 4096}
MOST_RUNS = 1_000_000  # of a plan
ADAM_FACTOR = 0.01  # of a rate for SGD with momentum: 1e-3 where SGD has 0.1


@dataclass(frozen=True)
class Slot:
    """One place in the plan; a final slot of a searched method has no learning rate until its search has ended."""

    phase: Phase
    method: str
    batch_size: int
    lr: float | None
    seed: int

    @property
    def cell(self) -> tuple[str, int]:
        """Method and batch size: what one learning rate is chosen for."""
        return self.method, self.batch_size


def validate(config: StudyConfig) -> None:
    """Check all that can be checked without data or model.

    Args:
        config: The study.
    """
    from normkit.study.methods import check_method

    validate_options(config)
    for method in config.methods:
        check_method(method)


def validate_options(config: StudyConfig) -> None:
    """Check what needs no method, and so no torch: the command line does so at once.

    Raises:
        StudyError: Names the argument, the value and the remedy.
    """
    if not config.methods:
        raise StudyError("--methods is empty; give at least one method, see `normkit recipes`")
    if not config.batch_sizes:
        raise StudyError("--batch-sizes is empty; give at least one, for example 64,8,1")
    for name, values in (("--methods", config.methods), ("--batch-sizes", config.batch_sizes)):
        doubled = sorted({str(value) for value in values if values.count(value) > 1})  # type: ignore[arg-type]
        if doubled:
            raise StudyError(f"{name}: {', '.join(doubled)} given twice; name each once")
    for flag, count in (
        ("--seeds", config.seeds),
        ("--budget", config.budget),
        ("--lr-points", config.lr_points),
        ("--search-seeds", config.search_seeds),
    ):
        if count < 1:
            raise StudyError(f"{flag} {count}: give at least 1")
        if count > MOST.get(flag, count):
            raise StudyError(f"{flag} {count}: give at most {MOST[flag]}")
    if not 0 <= config.lr_extend <= MOST["--lr-extend"]:
        raise StudyError(f"--lr-extend {config.lr_extend}: give a number from 0 to {MOST['--lr-extend']}")
    for flag, size in (("--image-size", config.image_size), ("--limit", config.limit)):
        if size is not None and not 1 <= size <= MOST.get(flag, size):
            raise StudyError(f"{flag} {size}: give at least 1{f' and at most {MOST[flag]}' if flag in MOST else ''}")
    for size in config.batch_sizes:
        if size < 1:
            raise StudyError(f"--batch-sizes: {size} is not a batch size; give positive integers")
        if size > config.budget:
            raise StudyError(
                f"--batch-sizes: {size} is larger than the budget of {config.budget} examples; raise --budget"
            )
    _check_last_batches(config)
    if isinstance(config.lr, dict) and sorted(config.lr) != sorted(config.methods):
        raise StudyError(f"--lr: rates for {', '.join(config.lr)}; give one for each of {', '.join(config.methods)}")
    for rate in (given_rates(config) or {}).values():
        if not (rate > 0 and math.isfinite(rate)):
            raise StudyError(f"--lr {rate}: a learning rate is a positive number, or 'auto'")
    searched = config.lr_points * config.search_seeds if config.lr == "auto" else 0
    runs = len(config.methods) * len(config.batch_sizes) * (searched + config.seeds)
    if runs > MOST_RUNS:
        raise StudyError(
            f"--seeds, --lr-points, --search-seeds: the plan has {runs:,} runs; give at most {MOST_RUNS:,}"
        )
    share = config.search_budget
    if not (0 < share <= 1 or (1 < share <= config.budget and share % 1 == 0)):
        raise StudyError(
            f"--search-budget {share:g}: give a fraction of --budget in (0, 1], or a number of samples up to {config.budget}"
        )
    if not (0 < config.validation < 1 or (config.validation >= 1 and config.validation % 1 == 0)):
        raise StudyError(f"--validation {config.validation:g}: give a share between 0 and 1, or a number of examples")
    if config.task is not None:
        _check_options_of_task(config)
    config.validate()


def _check_last_batches(config: StudyConfig) -> None:
    """Refuse a last batch, or micro-batch, of one sample: batch normalization may not run on it, which would say nothing of it.

    Raises:
        StudyError: There is one.
    """
    phases: tuple[tuple[str, Phase], ...] = (("--budget", "final"), ("--search-budget", "search"))
    for size in config.batch_sizes:
        for flag, phase in phases:
            samples = config.budget_of(phase)
            if size > 1 and samples % size == 1 and (phase == "final" or config.lr == "auto"):
                raise StudyError(
                    f"{flag}: of {samples} samples a last batch of one would be left at batch size {size}; give {samples - 1} or "
                    f"{samples - 1 + size}"
                )
        micro = config.micro_batch
        if 1 < micro < size and size % micro == 1:
            raise StudyError(
                f"--micro-batch: {micro} would leave a micro-batch of one sample of a batch of {size}; give a divisor of {size}"
            )


def _check_options_of_task(config: StudyConfig) -> None:
    default = StudyConfig()
    given = [name for name in OF_NAMED_DATA if getattr(config, name) != getattr(default, name)]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise StudyError(f"{flags}: --task {config.task} brings its own data, model and loss; leave out {flags}")


def given_rates(config: StudyConfig) -> dict[str, float] | None:
    """Method -> learning rate, where the study fixes them; None where they are searched."""
    if config.lr == "auto":
        return None
    return config.lr if isinstance(config.lr, dict) else dict.fromkeys(config.methods, config.lr)


def learning_rates(config: StudyConfig, method: str, batch_size: int, *, below: int = 0, above: int = 0) -> list[float]:
    """The grid of a method at a batch size: ``lr_points`` values a factor sqrt(10) apart around the recipe's centre.

    A recipe's centre is for SGD at batch size 64 and moves with ``(batch_size / 64) ** recipe.lr_exponent``.

    Args:
        config: The study.
        method: The method.
        batch_size: The batch size.
        below: Points that the grid has in addition at its lower end.
        above: Points at its upper end.
    """
    if (rates := given_rates(config)) is not None:
        return [rates[method]]
    from normkit._apply import recipes  # torch, which the command line's first checks do without
    from normkit.study.methods import parse_method

    recipe = recipes()[parse_method(method)[0]]
    factor = ADAM_FACTOR if config.optimizer.startswith("adam") and not recipe.own_optimizer else 1
    centre = recipe.lr * factor * (batch_size / 64) ** recipe.lr_exponent
    offset = (config.lr_points - 1) / 2
    return [float(f"{centre * GRID_STEP ** (i - offset):.3g}") for i in range(-below, config.lr_points + above)]


def search_rates(config: StudyConfig, method: str, batch_size: int, searched: Iterable[TrialResult]) -> list[float]:
    """The learning rates that a search tries, as far as its results say; it has ended when all of them have results.

    The grid gains a point at its lower or upper end while the best rate is the one there, at most ``lr_extend`` at each end. A
    search of one point has no ends.

    Args:
        config: The study.
        method: The method.
        batch_size: The batch size.
        searched: Results of its search so far, in any order.
    """
    searched = list(searched)
    below = above = 0
    while True:
        grid = learning_rates(config, method, batch_size, below=below, above=above)
        done = [result for result in searched if result.key.lr in grid]
        if len(grid) == 1 or len(done) < len(grid) * config.search_seeds:
            return grid
        best = choose_lr(done, higher_is_better=config.higher_is_better)
        if best == grid[0] and below < config.lr_extend:
            below += 1
        elif best == grid[-1] and above < config.lr_extend:
            above += 1
        else:
            return grid


def search_slots(config: StudyConfig, method: str, batch_size: int, searched: Iterable[TrialResult]) -> list[Slot]:
    """The slots of a search, as far as its results say; see ``search_rates``."""
    rates = search_rates(config, method, batch_size, searched)
    seeds = range(SEARCH_SEED, SEARCH_SEED + config.search_seeds)
    return [Slot("search", method, batch_size, lr, seed) for seed in seeds for lr in rates]


def slots(config: StudyConfig, results: Iterable[TrialResult] = ()) -> list[Slot]:
    """The whole plan, small batch sizes (long runs) first, so that the last runs to end are short ones.

    Args:
        config: The study.
        results: What has ended; the plan has the learning rates that its searches have come to.
    """
    searched = search_results(results)
    plan: list[Slot] = []
    rates = given_rates(config)
    sizes = sorted(config.batch_sizes)
    if rates is None:
        plan += [
            slot
            for size in sizes
            for method in config.methods
            for slot in search_slots(config, method, size, searched.get((method, size), ()))
        ]
    plan += [
        Slot("final", method, size, None if rates is None else rates[method], seed)
        for size in sizes
        for seed in range(config.seeds)
        for method in config.methods
    ]
    return plan


def search_results(results: Iterable[TrialResult]) -> dict[tuple[str, int], list[TrialResult]]:
    """Results of searches by method and batch size."""
    by_cell: dict[tuple[str, int], list[TrialResult]] = {}
    for result in results:
        if result.key.phase == "search":
            by_cell.setdefault((result.key.method, result.key.batch_size), []).append(result)
    return by_cell


def choose_lr(searched: Iterable[TrialResult], *, higher_is_better: bool = True) -> float | None:
    """The learning rate with the best mean validation score (then the lower loss) over seeds.

    A rate at which any seed diverged is chosen only if every rate has diverged (then the smallest one); None when no run
    came to an end.
    """
    by_lr: dict[float, list[TrialResult]] = {}
    for result in searched:
        by_lr.setdefault(result.key.lr, []).append(result)
    scores: dict[float, tuple[float, float]] = {}
    for lr, results in by_lr.items():
        if all(r.state == "finished" for r in results):
            score = sum(r.validation_score or 0.0 for r in results) / len(results)
            loss = sum(r.validation_loss or 0.0 for r in results) / len(results)
            scores[lr] = (score if higher_is_better else -score, -loss)
    if scores:
        return max(scores, key=lambda lr: (*scores[lr], -lr))
    diverged = [lr for lr, results in by_lr.items() if any(r.state == "diverged" for r in results)]
    return min(diverged, default=None)


def resolve(slot: Slot, results: Sequence[TrialResult], config: StudyConfig) -> TrialKey | str | None:
    """Return the run that a slot becomes, given the results so far.

    Returns:
        The key of the run; None if its search has not ended; or, when no learning rate works, the reason as text.
    """
    if slot.lr is not None:
        return TrialKey(slot.phase, slot.method, slot.batch_size, slot.lr, slot.seed)
    searched = [r for r in results if r.key.phase == "search" and (r.key.method, r.key.batch_size) == slot.cell]
    if len(searched) < len(search_rates(config, *slot.cell, searched)) * config.search_seeds:
        return None
    lr = choose_lr(searched, higher_is_better=config.higher_is_better)
    if lr is None:
        return next((r.error for r in searched if r.error), "no learning rate worked")
    return TrialKey(slot.phase, slot.method, slot.batch_size, lr, slot.seed)
