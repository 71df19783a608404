"""ListOps: values by an independent evaluator, and the published distribution by an independent generator."""

from __future__ import annotations

import random
import statistics

import numpy as np
import pytest
from mambaseq_synthetic.listops import END, MIN, ListOpsData, decode, draw, encode, value

from mambaseq.errors import ConfigError, DataError


def evaluate(expression: str) -> int:
    """By recursion over the text."""
    rest = expression.replace("]", " ] ").split()

    def term() -> int:
        token = rest.pop(0)
        if token.isdigit():
            return int(token)
        arguments = []
        while rest[0] != "]":
            arguments.append(term())
        rest.pop(0)
        return {
            "[MIN": min,
            "[MAX": max,
            "[MED": lambda found: int(statistics.median(found)),
            "[SM": lambda found: sum(found) % 10,
        }[token](arguments)

    found = term()
    assert not rest
    return found


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),  # the example of the paper
        ("[MIN 3 [SM 9 9 4 ] 5 ]", 2),
        ("[MED 1 5 2 ]", 2),
        ("[MED 3 4 ]", 3),
        ("[MED 9 8 [MED 0 9 ] [MAX 1 3 ] ]", 6),
        ("[SM [SM 5 5 ] [SM 9 8 7 ] 1 ]", 5),
    ],
)
def test_literal_expressions(expression: str, expected: int) -> None:
    assert value(encode(expression)) == expected
    assert evaluate(expression) == expected
    assert decode(encode(expression)) == expression


def test_values_agree_with_the_independent_evaluator() -> None:
    train = ListOpsData().train()
    for index in range(200):
        item = train[index]
        assert item.targets is not None
        assert evaluate(decode(item.inputs[0].numpy())) == int(item.targets)


def test_limits_are_kept() -> None:
    shape = {"min_length": 10, "max_length": 60, "max_depth": 4, "max_args": 5}
    lengths, deepest, most = [], 0, 0
    for index in range(300):
        ids = draw(np.random.default_rng(index), **shape)
        lengths.append(len(ids))
        counts: list[int] = []
        for token in ids:
            if token == END:
                most = max(most, counts.pop())
                continue
            if counts:
                counts[-1] += 1
            if token >= MIN:
                counts.append(0)
                deepest = max(deepest, len(counts))
        assert not counts
    assert (min(lengths), max(lengths)) == (10, pytest.approx(60, abs=3))
    assert deepest == 3  # digits alone at depth 4
    assert most == 5


def published_length(rng: random.Random, depth: int, max_depth: int, max_args: int) -> int:
    """Tokens of an expression as the Long Range Arena draws it."""
    if depth >= max_depth or rng.random() > 0.25:
        return 1
    return 2 + sum(published_length(rng, depth + 1, max_depth, max_args) for _ in range(rng.randint(2, max_args)))


def test_the_distribution_is_the_published_one() -> None:
    rng = random.Random(0)
    published = []
    while len(published) < 1500:
        if 12 <= (length := published_length(rng, 1, 5, 6)) <= 80:
            published.append(length)
    ours = [
        len(draw(np.random.default_rng(k), min_length=12, max_length=80, max_depth=5, max_args=6)) for k in range(1500)
    ]
    for quantile in (0.25, 0.5, 0.75):
        share = np.mean(np.array(ours) <= np.quantile(published, quantile))
        expected = np.mean(np.array(published) <= np.quantile(published, quantile))
        assert share == pytest.approx(expected, abs=5 * (2 * 0.25 / 1500) ** 0.5)


def test_settings_that_cannot_be() -> None:
    for wrong in ({"min_length": 3}, {"min_length": 300}, {"max_depth": 1}, {"max_args": 1}):
        with pytest.raises(ConfigError, match=f"data.{next(iter(wrong))}"):
            ListOpsData(**wrong)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"No expression of 90 to 100 tokens"):
        draw(np.random.default_rng(0), min_length=90, max_length=100, max_depth=2, max_args=5)
