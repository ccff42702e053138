"""How two sets of features lie to each other: by the balls around each point that reach to its k-th neighbour."""

from collections.abc import Iterator

import torch

from reading.wording import counted


ELEMENTS = 2**26  # of a matrix at a time, in float64


def manifold_metrics(fake: torch.Tensor, real: torch.Tensor, neighbours: int) -> dict[str, float]:
    """Precision and recall of Kynkäänniemi et al. 2019 (arXiv 1904.06991, equation 2), density and coverage of Naeem et
    al. 2020 (arXiv 2002.09797, equations 5 and 6).

    A point's ball reaches to the `neighbours`-th nearest of the other points of its own set; its border belongs to it.

    Args:
        fake: (M, D), features of generated images.
        real: (N, D), of real ones.
        neighbours: k.

    Returns:
        precision: share of generated points that lie in the ball of a real one, in [0, 1].
        recall: share of real points that lie in the ball of a generated one, in [0, 1].
        density: how many real balls a generated point lies in on average, over k: 0 at least, and 1 is expected where
            both sets are of one distribution.
        coverage: share of real points whose ball has a generated point in it, in [0, 1].

    Raises:
        ValueError: a set has no `neighbours` + 1 points.
    """
    for name, points in (("fake", fake), ("real", real)):
        if len(points) <= neighbours:
            raise ValueError(
                f"{name} has {counted(len(points), 'point')}: {neighbours} neighbours need {neighbours + 1} at least."
            )
    fake, real = fake.double(), real.double()
    fake_radii, real_radii = radii(fake, neighbours), radii(real, neighbours)
    precise, balls = 0, 0
    recalled, covered = (torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2))
    for rows, part in _distances(fake, real):
        within = part <= real_radii
        precise += within.any(1).sum().item()
        balls += within.sum().item()
        covered |= within.any(0)
        recalled |= (part <= fake_radii[rows, None]).any(0)
    return {
        "precision": precise / len(fake),
        "recall": recalled.double().mean().item(),
        "density": balls / (neighbours * len(fake)),
        "coverage": covered.double().mean().item(),
    }


def radii(points: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Distance of each of (N, D) points to the `neighbours`-th nearest of the others, (N,) of float64."""
    parts = []
    for rows, part in _distances(points.double(), points.double()):
        part[torch.arange(len(part)), torch.arange(rows.start, rows.stop)] = torch.inf  # itself
        parts.append(part.kthvalue(neighbours, dim=1).values)
    return torch.cat(parts)


def nearest(points: torch.Tensor, among: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` nearest to each of (M, D) points among (N, D), fewer where there are fewer: L2 distances in ascending
    order, float64, and numbers, int64; (M, count) each."""
    points, among = points.double(), among.double()
    distances, numbers = [], []
    for rows, part in _distances(points, among):
        found = part.topk(min(count, len(among)), dim=1, largest=False).indices
        # again, without the rounding of a matrix product: of equal points it is 0
        exact = (points[rows, None] - among[found]).norm(dim=2)
        exact, order = exact.sort(dim=1, stable=True)
        distances.append(exact)
        numbers.append(found.gather(1, order))
    return torch.cat(distances), torch.cat(numbers)


def _distances(points: torch.Tensor, among: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of the matrix of L2 distances, some at a time, and which they are."""
    rows = max(1, ELEMENTS // max(len(among), 4 * among.shape[1]))  # `nearest` looks at some features of each
    for start in range(0, len(points), rows):
        part = slice(start, min(start + rows, len(points)))
        yield part, torch.cdist(points[part], among)
