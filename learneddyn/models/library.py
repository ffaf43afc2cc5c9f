"""A library of candidate terms: monomials of the observation, actions, and their products, evaluated fast.

`PolynomialLibrary` lists the terms, names them and evaluates all of them so that gradients flow. `Evaluator` evaluates
the few terms that a sparse model uses, for rollouts: one contiguous row per term (``[p b]``, "feature-major"), every
product the product of two rows that are there already, in memory that is used again. Products then run over the batch
and not over a handful of columns.
"""

import sys
import threading
from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement

import torch
from jaxtyping import Float
from torch import Tensor, nn

_BLOCK = 131_072  # numbers in the rows of a block


class PolynomialLibrary(nn.Module):
    """[monomials of the coordinates up to ``degree``, action, and, with ``products``, every monomial times an action].

    Coordinates are the observation columns, those in ``angles`` as cosine and sine. Terms with the square of a sine (of
    an angle, or of a pair in ``unit_pairs``) are left out where sin^2 = 1 - cos^2 makes others of them that are there:
    no regression could tell them apart. A term is the tuple of its factors: 0 the constant, then the coordinates (plain
    columns, cosines, sines), then the actions.

    Args:
        obs_dim: observation columns.
        action_dim: action columns.
        degree: of the monomials.
        interactions: products of different coordinates, not only powers of one.
        products: monomials times actions.
        bias: a constant term.
        angles: observation columns in radians.
        unit_pairs: pairs of observation columns (cosine, sine).

    Raises:
        ValueError: a degree below 1, or an angle or a pair that names no observation column.
    """

    factors: Tensor

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        *,
        degree: int = 2,
        interactions: bool = True,
        products: bool = True,
        bias: bool = False,
        angles: Sequence[int] = (),
        unit_pairs: Sequence[Sequence[int]] = (),
    ) -> None:
        super().__init__()
        if degree < 1:
            raise ValueError(f"degree must be at least 1, got {degree!r}")
        if any(not 0 <= column < obs_dim for column in angles):
            raise ValueError(f"angles must name observation columns 0 to {obs_dim - 1}, got {list(angles)}")
        if any(len(pair) != 2 or not set(pair) <= set(range(obs_dim)) - set(angles) for pair in unit_pairs):
            raise ValueError(f"unit_pairs must be (cosine, sine) among columns 0 to {obs_dim - 1}, got {unit_pairs}")
        self.obs_dim, self.action_dim, self.angles = obs_dim, action_dim, list(angles)
        self.plain = [column for column in range(obs_dim) if column not in self.angles]
        self.coordinates = obs_dim + len(self.angles)
        monomials = [
            factors
            for total in range(1, degree + 1)
            for factors in combinations_with_replacement(range(1, self.coordinates + 1), total)
            if interactions or len(set(factors)) == 1
        ]
        inputs = range(self.coordinates + 1, self.coordinates + action_dim + 1)
        both = [(*factors, u) for u in inputs for factors in monomials] if products else []
        every = [(0,)] * bias + monomials + [(u,) for u in inputs] + both
        cosines = range(1 + len(self.plain), 1 + obs_dim)
        pairs = [(row, row + len(self.angles)) for row in cosines]
        pairs += [(1 + self.plain.index(cosine), 1 + self.plain.index(sine)) for cosine, sine in unit_pairs]
        self.terms: list[tuple[int, ...]] = [one for one in every if not _redundant(one, pairs, set(every))]
        width = max(map(len, self.terms))
        # Row 0 is the constant: it fills the terms that have fewer factors than others.
        padded = [[*term, *[0] * (width - len(term))] for term in self.terms]
        self.register_buffer("factors", torch.tensor(padded).T.contiguous(), persistent=False)

    def __len__(self) -> int:
        return len(self.terms)

    def forward(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"]) -> Float[Tensor, "b p"]:
        """Return the candidate terms of every row; differentiable."""
        angle = obs[:, self.angles]
        parts = [torch.ones_like(obs[:, :1]), obs[:, self.plain], angle.cos(), angle.sin(), action]
        rows = torch.cat(parts, dim=1).T.contiguous()
        terms = rows.index_select(0, self.factors[0])
        for factor in self.factors[1:]:
            terms = terms * rows.index_select(0, factor)
        return terms.T

    def names(self, columns: Sequence[str] | None = None) -> list[str]:
        """Return the terms in words; ``columns`` names the observation columns, then the actions.

        Raises:
            ValueError: ``columns`` are not one name each.
        """
        o, a = self.obs_dim, self.action_dim
        own = [f"x{i}" for i in range(o)] + [f"u{i}" for i in range(a)] if columns is None else list(columns)
        if len(own) != o + a:
            raise ValueError(f"names must be {o} observation columns and {a} actions, got {own}")
        cosines, sines = ([f"{call}({own[i]})" for i in self.angles] for call in ("cos", "sin"))
        rows = ["1", *(own[i] for i in self.plain), *cosines, *sines, *own[o:]]
        return [" ".join(rows[i] for i in term if i) or "1" for term in self.terms]


def sum_of_terms(coefficients: Sequence[float], names: Sequence[str], digits: int, first: Sequence[str] = ()) -> str:
    """Return the terms that are not zero as a sum, after ``first``: ``0.9 x0 - 0.2 x0 x1``."""
    parts = [*first, *(f"{c:.{digits}g} {name}" for c, name in zip(coefficients, names, strict=True) if c)]
    return " + ".join(parts).replace("+ -", "- ") or "0"


class Evaluator:
    """Sums of chosen terms of a library, without gradients, feature-major.

    Args:
        library: the terms.
        coefficients: ``[m p q]``, m sums for each of q outputs over the p terms; terms that no sum uses cost nothing
            unless others are made of them.
    """

    def __init__(self, library: PolynomialLibrary, coefficients: Float[Tensor, "m p q"]) -> None:
        used = (coefficients != 0).any(dim=2).any(dim=0).nonzero().flatten().tolist()
        wanted = [library.terms[index] for index in used]
        actions = [(library.coordinates + 1 + i,) for i in range(library.action_dim)]
        singles = [(0,), *actions, *((1 + i,) for i in range(library.coordinates))]
        needed = {part for term in wanted for part in _closure(term, library.coordinates)} - set(singles)
        # Monomials first, by degree; then what an action multiplies: stretches of them become one product.
        order = sorted(needed, key=lambda term: (max(0, term[-1] - library.coordinates), len(term), term))
        place = {term: row for row, term in enumerate([*singles, *order])}
        self._library = library
        self._products = list(_stretches(order, place, library.coordinates))
        weights = coefficients.new_zeros(len(coefficients), coefficients.shape[2], len(place))
        weights[:, :, [place[term] for term in wanted]] = coefficients[:, used].mT
        self._weights, self._constant = list(weights), (0,) in wanted
        # A block of half a megabyte stays in a core's cache; a GPU wants one call for all lanes.
        self._block = max(256, _BLOCK // len(place)) if weights.is_cpu else sys.maxsize
        self._memory = _Memory(weights[0, 0], self._products)

    def write(
        self,
        obs: Float[Tensor, "o b"],
        action: Float[Tensor, "a b"],
        out: Float[Tensor, "m q b"],
        *,
        plus: Sequence[int] = (),
        first: int = 0,
    ) -> None:
        """Write the sums of m members, from the ``first`` on, into ``out``, plus these columns of ``obs``."""
        lanes, size = obs.shape[1], self._block
        if lanes <= size:
            self._write(obs, action, out, plus, first)
            return
        for start in range(0, lanes, size):
            part = slice(start, min(start + size, lanes))
            self._write(obs[:, part], action[:, part], out[:, :, part], plus, first)

    def _write(self, obs: Tensor, action: Tensor, out: Tensor, plus: Sequence[int], first: int) -> None:
        terms = self._terms(obs, action)
        for member in range(len(out)):
            torch.mm(self._weights[first + member], terms, out=out[member])
        if len(plus) == len(obs):
            out += obs
        else:
            for column in plus:
                out[:, column] += obs[column]

    def _terms(self, obs: Float[Tensor, "o b"], action: Float[Tensor, "a b"]) -> Float[Tensor, "p b"]:
        """Return the rows; their memory is written again by the next call of this thread."""
        library, a = self._library, len(action)
        rows, singles, products = self._memory.of(obs.shape[1])
        if self._constant:
            singles[0].fill_(1)
        if a:
            rows.narrow(0, 1, a).copy_(action)
        if not library.angles:
            rows.narrow(0, 1 + a, len(obs)).copy_(obs)
        else:
            cosines = 1 + a + len(library.plain)
            for row, column in enumerate(library.plain, 1 + a):
                singles[row].copy_(obs[column])
            for row, column in enumerate(library.angles, cosines):
                torch.cos(obs[column], out=singles[row])
                torch.sin(obs[column], out=singles[row + len(library.angles)])
        for one, other, product in products:
            torch.mul(one, other, out=product)
        return rows


_Stretch = tuple[int, int, int, int]
"""Consecutive products: their first row, how many, the first row of what is multiplied, and the row that multiplies."""
_Views = tuple[Tensor, list[Tensor], list[tuple[Tensor, Tensor, Tensor]]]


class _Memory(threading.local):
    """The rows for the last two batch sizes, apart for every thread, with the views that the products work on."""

    def __init__(self, like: Float[Tensor, " p"], stretches: Sequence[_Stretch]) -> None:
        self._like, self._stretches = like, stretches
        self._kept: dict[int, _Views] = {}

    def __reduce__(self) -> tuple[type["_Memory"], tuple[Tensor, Sequence[_Stretch]]]:
        """Let copies begin with memory of their own."""
        return _Memory, (self._like, self._stretches)

    def of(self, lanes: int) -> _Views:
        """Return all rows, each by itself, and the views of the products."""
        found = self._kept.get(lanes)
        if found is None:
            if len(self._kept) == 2:
                self._kept.clear()
            # Memory made in inference mode could not be written outside of it. A row that is not written must be
            # finite, because it is multiplied by zero.
            with torch.inference_mode(False):
                rows = self._like.new_zeros(len(self._like), lanes)
                views = [(rows[of : of + n], rows[by], rows[at : at + n]) for at, n, of, by in self._stretches]
            found = self._kept[lanes] = rows, list(rows), views
        return found


def _redundant(term: tuple[int, ...], pairs: Sequence[tuple[int, int]], terms: set[tuple[int, ...]]) -> bool:
    """Tell whether sin^2 = 1 - cos^2 makes two other terms of this one; ``pairs`` are (cosine, sine)."""
    for cosine, sine in pairs:
        if term.count(sine) >= 2:
            rest = list(term)
            rest.remove(sine)
            rest.remove(sine)
            if (tuple(rest) or (0,)) in terms and tuple(sorted([*rest, cosine, cosine])) in terms:
                return True
    return False


def _parts(term: tuple[int, ...], coordinates: int) -> tuple[int, tuple[int, ...]]:
    """Return the factor of a product that multiplies, and the term it multiplies."""
    return (term[-1], term[:-1]) if term[-1] > coordinates else (term[0], term[1:])


def _closure(term: tuple[int, ...], coordinates: int) -> Iterator[tuple[int, ...]]:
    """Return a term and all that it is made of."""
    yield term
    while len(term) > 1:
        _, term = _parts(term, coordinates)
        yield term


def _stretches(
    order: Sequence[tuple[int, ...]], place: dict[tuple[int, ...], int], coordinates: int
) -> Iterator[_Stretch]:
    """Return the products, neighbours that multiply neighbours by the same row together."""
    run: list[int] = []
    for term in order:
        factor, rest = _parts(term, coordinates)
        at, of, by = place[term], place[rest], place[(factor,)]
        if run and by == run[3] and of == run[2] + run[1] and of < run[0]:
            run[1] += 1
            continue
        if run:
            yield run[0], run[1], run[2], run[3]
        run = [at, 1, of, by]
    if run:
        yield run[0], run[1], run[2], run[3]
