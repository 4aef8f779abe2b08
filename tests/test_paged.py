"""Pages: none is lost, none has two writers, rows that share them decode as rows that do not."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from models import MIXED, fed, filled, prompt_ids, tiny

import kvjax
from kvjax import CacheError, caches, struct
from kvjax.caches.base import Cache, LayerShape, Project, Span
from kvjax.caches.flags import PAGES
from kvjax.caches.pages import Pages
from kvjax.ops.attention import EMPTY

# ------------------------------------------------------- any sequence of operations against reference counts in Python

PAGE, CAPACITY, ROWS, CHUNK = 2, 12, 3, 5
ONE = LayerShape(1, 1, 1, jnp.float32)


def fresh(plan, pages=Pages, batch=ROWS) -> Cache:
    """A cache of one layer that keeps a number a token, without a model."""
    entry = plan.shared(batch, CAPACITY)["pages"]
    made = pages(*(getattr(entry, field.name) for field in dataclasses.fields(entry) if not field.kw_only))
    lengths, written, flags = (jnp.zeros((batch,), jnp.int32) for _ in range(3))
    tokens = jnp.full((batch, CAPACITY), -1, jnp.int32)
    return Cache((plan.init(ONE, batch, CAPACITY),), {"pages": made}, tokens, lengths, written, flags)


@jax.jit
def feed(cache, x, valid):
    valid = jnp.where(cache.lengths + valid > CAPACITY, 0, valid)
    span = Span(cache.lengths, valid, cache.lengths[:, None] + jnp.arange(CHUNK, dtype=jnp.int32)[None, :])
    shared, refused = cache.reserve(span)
    span = span.replace(valid=jnp.where(refused != 0, 0, valid))
    project = Project(lambda h, at: (h[:, :, None, None],) * 2, lambda x, at: x)
    _, node = cache.layers[0].extend(x, project, span, shared)
    return cache.replace(layers=(node,), shared=shared, lengths=span.end, written=span.end + 0, flags=refused)


DO = {
    "rewind": jax.jit(lambda cache, to: cache.rewind(to)),
    "take": jax.jit(lambda cache, rows: cache.take(rows)),
    "insert": jax.jit(lambda cache, row, source: cache.insert(row, cache.take(source))),
    "fork": jax.jit(lambda cache, rows: cache.fork(2).take(rows)),
    "release": jax.jit(lambda cache, rows: cache.release(rows)),
    "resize": jax.jit(lambda cache: cache.resize(CAPACITY + 5).resize(CAPACITY)),
    "keep": jax.jit(lambda cache, start, path, counts: cache.keep(start, path, counts)),
}


LOOK = jax.jit(lambda cache: (cache.positions(0), cache.keys(0)[:, 0, :, 0]))


class Sheet:
    """A page of the Python model: who reads it."""

    def __init__(self):
        self.readers = set()


class Model:
    """Texts and reference counts of rows, in plain Python."""

    def __init__(self, pool, share):
        self.pool, self.share = pool, share
        self.texts = [[] for _ in range(ROWS)]
        self.sheets = [[] for _ in range(ROWS)]
        self.lost = [False] * ROWS
        self.flagged = [False] * ROWS

    def free(self):
        return self.pool - len({sheet for row in self.sheets for sheet in row})

    def feed(self, x, valid):
        """Rows that were refused."""
        need, refused = {}, [row for row in range(ROWS) if self.lost[row]]
        for row, n in enumerate(valid):
            n = 0 if len(self.texts[row]) + n > CAPACITY else n
            need[row] = (-(-(len(self.texts[row]) + n) // PAGE) - len(self.sheets[row]), n)
        free = self.free()
        for row in sorted(set(need) - set(refused), key=lambda row: (need[row][0], row)):
            pages, n = need[row]
            if pages > free:
                refused.append(row)
                continue
            free -= pages
            self.texts[row] += x[row, :n].tolist()
            self.sheets[row] += [self.new(row) for _ in range(pages)]
        return set(refused)

    def new(self, row):
        sheet = Sheet()
        sheet.readers.add(row)
        return sheet

    def alone(self, writes):
        """Pages `(row, column)` that are about to be written get one reader; rows that could not."""
        crowded = [(r, c) for r, c in writes if len(self.sheets[r][c].readers) > 1]
        leaves = []
        for r, c in crowded:
            readers = self.sheets[r][c].readers
            if not (all((other, c) in writes for other in readers) and r == min(readers)):
                leaves.append((r, c))
        if len(leaves) > self.free():
            return {r for r, _ in crowded}
        for r, c in leaves:
            self.sheets[r][c].readers.discard(r)
            self.sheets[r][c] = self.new(r)
        return set()

    def cut(self, row, length):
        for sheet in self.sheets[row][-(-length // PAGE) :]:
            sheet.readers.discard(row)
        self.sheets[row] = self.sheets[row][: -(-length // PAGE)]
        self.texts[row] = self.texts[row][:length]
        self.lost[row] &= length > 0

    def rewind(self, lengths):
        before = [(list(self.texts[row]), list(self.sheets[row])) for row in range(ROWS)]
        for row, length in enumerate(lengths):
            self.cut(row, length)
        ends = {(r, n // PAGE) for r, n in enumerate(lengths) if n % PAGE and not self.lost[r]}
        refused = self.alone(ends)
        for row in refused:
            self.texts[row], self.sheets[row] = before[row]
            for sheet in self.sheets[row]:
                sheet.readers.add(row)
        return refused

    def take(self, rows, width):
        made, copies, old = [], {}, self.sheets
        texts = [list(self.texts[row]) for row in rows]
        lost = [self.lost[row] for row in rows]
        flagged = [self.flagged[row] for row in rows]
        sheets = []
        for new, row in enumerate(rows):
            sheets.append([])
            for column, sheet in enumerate(old[row]):
                full = column < len(old[row]) - 1 or len(sheet.readers) > 1
                last = copies.get(sheet) if full and self.share > 1 else None
                if last is None or len(last.readers) == self.share:
                    last = copies[sheet] = self.new(new)
                    made.append(last)
                last.readers.add(new)
                sheets[-1].append(last)
        number = {sheet: i for i, sheet in enumerate(made)}
        pool = width if self.pool == ROWS * CAPACITY // PAGE else self.pool
        for new in range(len(rows)):
            if any(number[sheet] >= pool for sheet in sheets[new]):
                for sheet in sheets[new]:
                    sheet.readers.discard(new)
                sheets[new], lost[new], flagged[new] = [], True, True
        self.texts, self.sheets, self.lost, self.flagged = texts, sheets, lost, flagged

    def check(self, cache):
        """Pages, readers and contents are those of the real one."""
        pages = jax.device_get(cache.shared["pages"])
        size, share = pages.readers.shape
        used = {sheet for row in self.sheets for sheet in row}
        assert size == self.pool and (pages.readers[:, 0] >= 0).sum() == len(used), "free + used = P"
        lengths = [len(text) for text in self.texts]
        np.testing.assert_array_equal(cache.lengths, lengths)
        at = {}
        for row, sheets in enumerate(self.sheets):
            mine = pages.table[row][: len(sheets)].tolist()
            assert (pages.table[row][len(sheets) :] == -1).all() and -1 not in mine and len(set(mine)) == len(mine)
            for column, (page, sheet) in enumerate(zip(mine, sheets, strict=True)):
                assert at.setdefault(sheet, page) == page, "one page of the model, two of the pool"
                readers = pages.readers[page]
                assert sorted(readers[readers >= 0]) == sorted(sheet.readers) and len(sheet.readers) <= share
                assert pages.index[page] == column
                if len(sheet.readers) > 1:
                    assert all(lengths[r] >= (column + 1) * PAGE for r in sheet.readers), "two writers"
        assert len(set(at.values())) == len(at), "two pages of the model, one of the pool"
        held, keys = LOOK(cache)
        for row, text in enumerate(self.texts):
            live = np.asarray(held)[row] != EMPTY
            assert np.asarray(keys)[row][live].tolist() == ([] if self.lost[row] else text), "contents"


def play(draw, share, pool, pages=Pages, count=14):
    """A random program on the cache and on the model of it."""
    plan = caches.paged(PAGE, None if pool == ROWS * CAPACITY // PAGE else pool, share=share)
    cache, model, token = fresh(plan, pages), Model(pool, share), 0
    for _ in range(count):
        what = draw(st.sampled_from(["feed", "feed", "feed", *DO]))
        row = st.integers(0, ROWS - 1)
        lengths = [len(text) for text in model.texts]
        expected = set()
        if what == "feed":
            x = token + np.arange(ROWS * CHUNK, dtype=np.float32).reshape(ROWS, CHUNK)
            token += x.size
            valid = np.array([draw(st.integers(0, CHUNK)) for _ in range(ROWS)], np.int32)
            cache, expected = feed(cache, x, valid), model.feed(x, valid)
        elif what == "rewind":
            to = np.array(
                [draw(st.integers(0 if not model.lost[r] else n, n)) for r, n in enumerate(lengths)], np.int32
            )
            cache, expected = DO[what](cache, to), model.rewind(to)
        elif what == "keep":
            start = np.array([draw(st.integers(0, n)) for n in lengths], np.int32)
            start = np.where(model.lost, lengths, start).astype(np.int32)
            counts = np.array([draw(st.integers(0, min(2, n - s))) for n, s in zip(lengths, start, strict=True)])
            path = np.array(
                [[min(1, n - s - 1) if c == 1 else 0, 1] for n, s, c in zip(lengths, start, counts, strict=True)]
            )
            cache = DO[what](cache, start, path.astype(np.int32), counts.astype(np.int32))
            writes = {
                (r, (s + i) // PAGE) for r, (s, c) in enumerate(zip(start, counts, strict=True)) for i in range(c)
            }
            refused = model.alone(writes)
            for r in set(range(ROWS)) - refused:
                text = model.texts[r]
                text[start[r] : start[r] + counts[r]] = [text[start[r] + i] for i in path[r][: counts[r]]]
            ends = [lengths[r] if r in refused else start[r] + counts[r] for r in range(ROWS)]
            expected = refused | model.rewind(ends)
        elif what == "resize":
            cache = DO[what](cache)
        elif what == "release":
            gone = draw(row)
            cache = DO[what](cache, np.array([gone], np.int32))
            model.cut(gone, 0)
        else:
            rows = np.array([draw(row) for _ in range(ROWS)], np.int32)
            width = ROWS * CAPACITY // PAGE
            if what == "insert":
                target, source = rows[:1], rows[1:2]
                cache = DO[what](cache, target, source)
                model = inserted(model, int(target[0]), int(source[0]), width)
            elif what == "fork":
                twice = np.array([draw(st.integers(0, 2 * ROWS - 1)) for _ in range(ROWS)], np.int32)
                cache = DO[what](cache, twice)
                model.take([r for r in range(ROWS) for _ in range(2)], 2 * width)
                model.take(twice, width)
            else:
                cache = DO[what](cache, rows)
                model.take(rows, width)
            expected = {r for r in range(ROWS) if model.flagged[r]}
            model.flagged = [False] * ROWS
        found = set(np.flatnonzero(np.asarray(cache.flags) & PAGES).tolist())
        assert found == expected, f"{what}: rows {found} were refused, not {expected}"
        model.check(cache)
        cache = cache.replace(flags=np.zeros(ROWS, np.int32))


def inserted(model, target, source, width):
    """What `insert` of a copy of one row gives: the copy has pages of its own."""
    alone = Model(model.pool, model.share)
    alone.texts, alone.sheets, alone.lost = [[*t] for t in model.texts], model.sheets, [*model.lost]
    alone.take([source], CAPACITY // PAGE)
    both = Model(model.pool, model.share)
    both.texts, both.lost = model.texts + alone.texts, model.lost + alone.lost
    both.flagged = model.flagged + alone.flagged
    both.sheets = model.sheets + alone.sheets
    for sheet in {sheet for sheets in alone.sheets for sheet in sheets}:
        sheet.readers = {ROWS}
    both.take([ROWS if row == target else row for row in range(ROWS)], width)
    return both


WHOLE = ROWS * CAPACITY // PAGE
POOLS = [(1, WHOLE), (2, 7), *(pytest.param(*x, marks=pytest.mark.full) for x in ((2, WHOLE), (1, 7), (3, 9)))]


def check(share, pool, pages=Pages, examples=40):
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(st.data())
    def run(data):
        play(data.draw, share, pool, pages)

    run()


@pytest.mark.parametrize(("share", "pool"), POOLS)
def test_no_page_is_lost_or_written_by_two_in_any_sequence_of_operations(share, pool):
    check(share, pool)


@struct.node
class ReleasedTooEarly(Pages):
    def kept(self, lengths):
        return Pages.kept(self, lengths - self.page)


@struct.node
class WrittenByTwo(Pages):
    def _alone(self, writes):
        return self, jnp.zeros((writes.shape[0],), jnp.int32)


@struct.node
class BigFirst(Pages):
    """The running sum in the order of rows, refused ones counted."""

    def reserve(self, span):
        pages, flags = Pages.reserve(self, span)
        need = jnp.maximum(-(-span.end // self.page) - jnp.sum(self.table >= 0, axis=1), 0)
        starved = (need > 0) & (jnp.cumsum(need) > jnp.sum(self.free))
        return pages, jnp.where(starved, PAGES, flags)


@pytest.mark.parametrize(
    "mutant",
    [WrittenByTwo, *(pytest.param(x, marks=pytest.mark.full) for x in (ReleasedTooEarly, BigFirst))],
    ids=lambda mutant: mutant.__name__,
)
def test_the_check_catches(mutant):
    with pytest.raises(AssertionError):
        check(2, 7, mutant, 60)


# ------------------------------------------------------------------------------------------------- under a real model

MODEL = tiny(MIXED)
LONG = np.array([40, 7, 21], np.int32)


def steps(cache, tokens):
    """Logits `[n, B, V]` of tokens `[n, B]` fed one by one."""
    found = []
    for row in tokens:
        logits, cache = kvjax.step(MODEL, cache, row)
        found.append(np.asarray(logits))
    return np.array(found), cache


def close(got, want):
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("share", [pytest.param(1, marks=pytest.mark.full), 2])
def test_more_rows_times_capacity_than_pages_give_what_dense_gives(share):
    plan = caches.paged(8, pages=14, share=share)  # 3 x 96 slots would be 36
    want, whole = fed(MODEL, caches.dense(), LONG)
    got, cache = fed(MODEL, plan, LONG)
    close(got, want)
    for change in (
        lambda c: c,
        lambda c: c.take([2, 1, 2]),
        lambda c: c.fork(2).rewind([33, 40, 7, 2, 0, 21]).take([1, 3, 4]),
    ):
        if share == 1 and change(whole).lengths[1] == 2:
            continue  # a fork of all needs as many pages again
        tokens = prompt_ids(7, 10)[:, :3]
        (ours, after), (theirs, _) = steps(change(cache), tokens), steps(change(whole), tokens)
        close(ours, theirs)
        after.check()


def test_a_fork_shares_the_full_pages_and_writes_to_its_own():
    _, cache = fed(MODEL, caches.paged(8, share=4), LONG)
    used = lambda c: int(np.asarray(~c.shared["pages"].free).sum())  # noqa: E731
    assert used(cache) == 5 + 1 + 3
    forked = cache.fork(4)
    assert used(forked) == (4 + 4) + (0 + 4) + (2 + 4), "the last page of each row is its own, the others are one"
    assert used(cache.fork(5)) == 2 * 4 + 5 + 5 + 2 * 2 + 5, "a fifth row begins a copy for the next four"
    tokens = prompt_ids(8, 4, 12)
    ours, forked = steps(forked, tokens)
    theirs, _ = steps(fed(MODEL, caches.dense(), LONG)[1].fork(4), tokens)
    close(ours, theirs)
    assert used(forked.release(np.arange(1, 12))) == 6, "what only one row reads is its own"
    assert used(forked.release(np.arange(12))) == 0


@pytest.mark.full
def test_a_tree_kept_inside_shared_pages_leaves_the_other_rows_alone():
    logits, cache = fed(MODEL, caches.paged(8, share=3), LONG)
    _, whole = fed(MODEL, caches.dense(), LONG)
    start, path, counts = np.array([13, 2, 9] * 3) + 0, np.array([[0, 2, 4], [0, 1, 2], [1, 3, 6]] * 3), [3, 2, 1] * 3
    rows = [0, 1, 2] * 3
    counts = np.array(counts) * np.array([1] * 6 + [0] * 3)
    start = np.where(counts > 0, start, LONG[rows])
    (ours, _), (theirs, _) = (
        steps(c.take(rows).keep(start, path, counts), prompt_ids(7, 5, 9)) for c in (cache, whole)
    )
    close(ours, theirs)


def test_an_exhausted_pool_refuses_the_row_that_needs_most_and_says_so():
    _, cache = fed(MODEL, caches.paged(8, pages=10), LONG)  # 5 + 1 + 3 in use
    ids = prompt_ids(2)
    logits, after = kvjax.prefill(MODEL, cache, ids, np.array([16, 8, 2]))
    np.testing.assert_array_equal(after.flags, [PAGES, 0, 0])
    np.testing.assert_array_equal(after.lengths, [40, 15, 23])
    assert np.isnan(logits[0]).all() and not np.isnan(logits[1:]).any()
    with pytest.raises(CacheError, match="row 0, length 40, capacity 96: the page pool was exhausted"):
        after.check()
    again = after.release([1]).rewind([40, 0, 23])  # what another row gave back is there for it
    logits, again = kvjax.prefill(MODEL, again, ids, np.array([16, 0, 0]))
    want, _ = kvjax.prefill(MODEL, fed(MODEL, caches.dense(), LONG)[1], ids, np.array([16, 0, 0]))
    close(np.asarray(logits[0]), np.asarray(want[0]))
    with pytest.raises(CacheError, match="row 2.*the page pool was exhausted"):
        cache.take([0, 0, 1]).check()
    lost = cache.take([0, 0, 1]).rewind([39, 39, 7])  # clears the flag, not what is wrong
    _, lost = kvjax.step(MODEL, lost, ids[:, 0])
    np.testing.assert_array_equal(lost.flags, [0, 0, PAGES])
    with pytest.raises(CacheError, match="page pool"):
        kvjax.generate(MODEL, ids.tolist(), plan=caches.paged(8, pages=7), max_new_tokens=20)


def test_a_rewind_into_shared_pages_needs_a_page_and_otherwise_stays():
    _, cache = fed(MODEL, caches.paged(8, pages=4, share=2), np.array([17, 0, 0]))
    both = cache.take([0, 0, 1])  # pages 0 and 1 shared, the third of each its own
    assert not np.asarray(both.shared["pages"].free).any()
    full = both.rewind([16, 16, 0])
    _, full = kvjax.prefill(MODEL, full, prompt_ids()[:, :1], np.array([1, 0, 0]))
    _, full = kvjax.prefill(MODEL, full, prompt_ids()[:, :8], np.array([8, 0, 0]))
    with pytest.raises(CacheError, match="rewind: row 1 to length 11 needs a page of its own: the page pool"):
        full.rewind([25, 11, 0])
    flagged = jax.jit(lambda c, to: c.rewind(to))(full, jnp.array([25, 11, 0]))
    np.testing.assert_array_equal(flagged.flags, [0, PAGES, 0])
    np.testing.assert_array_equal(flagged.lengths, [25, 16, 0])


def test_under_jit_a_refused_rewind_leaves_its_pages_to_nobody_else():
    plan = caches.paged(PAGE, pages=5, share=3)
    numbers = lambda start: jnp.arange(start, start + CHUNK, dtype=jnp.float32)[None, :].repeat(ROWS, 0)  # noqa: E731
    cache = DO["take"](feed(fresh(plan), numbers(10), jnp.array([5, 0, 0])), jnp.array([0, 0, 0]))
    cache = DO["rewind"](cache, jnp.array([4, 4, 2]))  # all read the first page, rows 0 and 1 the second
    for count in (5, 1):
        cache = feed(cache, numbers(20), jnp.array([0, 0, count]))  # row 2 takes all that is free
    assert not np.asarray(cache.shared["pages"].free).any()
    before = np.asarray(LOOK(cache)[1])
    back = DO["rewind"](cache, jnp.array([1, 3, 8]))  # row 0 would need a page of its own
    np.testing.assert_array_equal(back.lengths, [4, 4, 8])
    np.testing.assert_array_equal(back.flags, [PAGES, PAGES, 0])
    after = feed(back, numbers(50), jnp.array([0, 1, 0]))
    np.testing.assert_array_equal(np.asarray(LOOK(after)[1])[0, :4], before[0, :4])


def test_a_row_of_nan_keys_does_not_reach_the_others():
    _, cache = filled(MODEL, caches.paged(8, share=2))
    first = int(cache.shared["pages"].table[0, 0])
    node = cache.layers[1]
    spoilt = node.k.data.reshape(-1, 2, 8, 8).at[first].set(jnp.nan).reshape(node.k.data.shape)
    bad = cache.replace(layers=(cache.layers[0], node.replace(k=node.k.replace(data=spoilt))))
    (got, _), (want, _) = (kvjax.step(MODEL, c, prompt_ids()[:, 0]) for c in (bad, cache))
    assert np.isnan(got[0]).all() and np.asarray(got[1:]).tobytes() == np.asarray(want[1:]).tobytes()


def test_keys_are_shown_as_dense_shows_them():
    _, cache = filled(MODEL, caches.paged(5, share=2, store=jnp.bfloat16))
    _, whole = filled(MODEL, caches.dense(store=jnp.bfloat16))
    at = np.asarray(whole.positions(1))
    np.testing.assert_array_equal(np.asarray(cache.positions(1))[:, :96], at)
    live = np.broadcast_to((at != EMPTY)[:, None], (3, 2, 96))
    for ours, theirs in ((cache.keys(1), whole.keys(1)), (cache.values(1), whole.values(1))):
        assert ours.shape == (3, 2, 100, 8) and ours.dtype == theirs.dtype
        np.testing.assert_allclose(
            np.asarray(ours[:, :, :96], np.float32)[live], np.asarray(theirs, np.float32)[live], rtol=1e-2, atol=1e-2
        )


def test_numbers_below_one_are_errors():
    for wrong in ({"page_size": 0}, {"pages": 0}, {"share": 0}, {"page_size": 2.0}):
        with pytest.raises(kvjax.InputError, match=f"caches.paged: {next(iter(wrong))} must be a whole number"):
            caches.paged(**wrong)
