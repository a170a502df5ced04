"""Is a pretraining still improving? A rule on measures that need no labels."""

TOLERANCE = 0.005  # relative improvement that counts
PATIENCE = 3  # evaluations without an improvement
ALIKE = 2.0  # RankMe below which all images have almost the same features
COLLAPSED = 0.2  # of the highest RankMe; a healthy run may lose half of it
BETTER = {"loss": -1, "rankme": 1}  # sign of an improvement; alpha is not used: neither end is better


def verdict(history: dict[int, dict[str, float]]) -> str:
    """What evaluations by epoch show, from their `loss` and `rankme`; the initial weights (epoch 0) do not count.

    A measure improves when it is by more than `TOLERANCE` better than at its last improvement, as in torch's
    ReduceLROnPlateau. It is a plateau when neither has improved for `PATIENCE` evaluations. A RankMe below `COLLAPSED`
    of its maximum is a warning of its own, and so is one below `ALIKE`.
    """
    trained = {epoch: values for epoch, values in history.items() if epoch}
    ranks = {epoch: values["rankme"] for epoch, values in trained.items() if "rankme" in values}
    if ranks and list(ranks.values())[-1] < COLLAPSED * max(ranks.values()):
        peak = max(ranks, key=ranks.__getitem__)
        return f"features may be collapsing: RankMe is below {COLLAPSED:.0%} of epoch {peak}'s"
    if ranks and list(ranks.values())[-1] < ALIKE:
        return f"features are all alike, RankMe is below {ALIKE:g}: they have collapsed, or the images are all alike"
    if len(trained) <= PATIENCE:
        return "too early to tell"
    since = max(last_improvement(trained, name, sign) for name, sign in BETTER.items())
    if sum(epoch > since for epoch in trained) >= PATIENCE:
        return f"plateau since epoch {since}"
    return "still improving"


def last_improvement(history: dict[int, dict[str, float]], name: str, sign: int) -> int:
    """The epoch of a measure's last improvement; the first one if there is none, 0 without values."""
    best, found = None, 0
    for epoch, values in history.items():
        value = values.get(name)
        if value is not None and (best is None or sign * (value - best) > TOLERANCE * abs(best)):
            best, found = value, epoch
    return found
