# mypy: allow-untyped-defs
"""A text cut into pieces that are looked up among those met before: Numba kernels over code points.

The pieces that are known lie end to end in `kept`, piece n from `begins[n]` to `begins[n + 1]`. `table` is a hash table
of their numbers with open addressing, -1 where a place is free; its size is a power of two. What has the same hash is
compared letter by letter, so that no two pieces are ever taken for each other.
"""

from __future__ import annotations

import numpy as np

from mambaseq.compiled import inner_njit, kept_njit

_PRIME, _SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(29)


@kept_njit(nogil=True)
def cut(points, white, seed, longest, known, table, hashes, begins, kept, numbers, long):
    """Cut code points where something white follows something that is not; new pieces are added to those known.

    points `(n,)` uint32. white `(m,)` bool: which of the first m code points are; none after them is. known: how many
    pieces are. numbers takes those of the pieces, and -1, -2, ... for pieces longer than `longest`, which are not kept:
    `long` takes where these begin and end. There must be room for n // 2 + 2 pieces and n code points.
    Returns how many pieces are known now, there are, and are long.
    """
    size, mask = points.size, np.uint64(table.size - 1)
    at, count, n_long = 0, 0, 0
    while at < size:
        start, mixed = at, seed
        while at < size and points[at] < white.size and white[points[at]]:
            mixed = (mixed ^ np.uint64(points[at])) * _PRIME
            at += 1
        while at < size and not (points[at] < white.size and white[points[at]]):
            mixed = (mixed ^ np.uint64(points[at])) * _PRIME
            at += 1
        length = at - start
        if length > longest:
            long[n_long, 0], long[n_long, 1] = start, at
            n_long += 1
            numbers[count] = -n_long
            count += 1
            continue
        mixed ^= mixed >> _SHIFT
        place = np.int64(mixed & mask)
        while True:
            number = table[place]
            if number < 0:
                number = known
                table[place], hashes[number] = number, mixed
                first = begins[number]
                for i in range(length):
                    kept[first + i] = points[start + i]
                begins[number + 1] = first + length
                known += 1
                break
            if hashes[number] == mixed and _same(points, start, kept, begins[number], begins[number + 1], length):
                break
            place = np.int64(np.uint64(place + 1) & mask)
        numbers[count] = number
        count += 1
    return known, count, n_long


@inner_njit()
def _same(points, start, kept, first, stop, length):
    if stop - first != length:
        return False
    for i in range(length):  # noqa: SIM110 - `all` of a generator is not compiled
        if kept[first + i] != points[start + i]:
            return False
    return True


@kept_njit(nogil=True)
def place_again(table, hashes, known):
    """Fill a table, all of whose places are free, with the pieces that are known."""
    mask = np.uint64(table.size - 1)
    for number in range(known):
        place = np.int64(hashes[number] & mask)
        while table[place] >= 0:
            place = np.int64(np.uint64(place + 1) & mask)
        table[place] = number


@kept_njit(nogil=True)
def size_of(numbers, starts):
    """How many ids the pieces of these numbers have, whose ids are from `starts[n]` to `starts[n + 1]`."""
    size = 0
    for number in numbers:
        size += starts[number + 1] - starts[number]
    return size


@kept_njit(nogil=True)
def gather(numbers, starts, ids, counts, to_ids, to_counts):
    """The ids and byte counts of the pieces of these numbers, end to end."""
    at = 0
    for number in numbers:
        for i in range(starts[number], starts[number + 1]):
            to_ids[at], to_counts[at] = ids[i], counts[i]
            at += 1
