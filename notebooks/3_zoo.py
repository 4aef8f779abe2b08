# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kvjax/kvjax/blob/main/notebooks/3_zoo.ipynb)
#
# # A zoo of caches
#
# A cache can keep everything or a window of it, as it is or in fewer bits, in one buffer or in pages. Some of these
# give the same text as no cache at all; others forget or blur something. This notebook measures what each costs, draws
# a paged cache page by page, and then writes a kind of its own, proves it, and breaks it on purpose to see whether the
# proof notices.

# %%
# Uses kvjax where it is installed, or the clone that this notebook lies in; else installs it, and no other jax.
import subprocess
import sys
from pathlib import Path

clone = next((str(p) for p in (Path.cwd(), *Path.cwd().parents) if (p / "kvjax" / "bundled").is_dir()), "")
sys.path += [clone] if clone else []
try:
    import matplotlib

    import kvjax
except ModuleNotFoundError:
    wanted = f"{clone}[plots]" if clone else "kvjax[plots] @ git+https://github.com/kvjax/kvjax"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wanted], check=True)

# %%
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch, Rectangle

import kvjax
from kvjax import caches, codecs, struct, testing
from kvjax.testing import induction, moves, mutants, promises

plt.style.use(["tableau-colorblind10", {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False}])
jax.config.update("jax_default_matmul_precision", "highest")  # GPUs and TPUs, too, multiply float32 as float32
BLUE, ORANGE, GREY, DARK = "#006BA4", "#FF800E", "#ABABAB", "#595959"

# %% [markdown]
# ## Two tests of a memory
#
# **A real text.** The bundled model `shakespeare` reads a scene of *The Tempest* that it was not trained on, and we ask
# how surprised it is, in nats per character: lower is better.
#
# **Copying.** A text is mostly guessed from the last few words, which is easy on a cache. The bundled model `induction`
# reads blocks of 16 to 48 random tokens that repeat: each token is determined, but only by what stood a block earlier.
# A cache that has lost that place, or blurred its key, cannot guess it.

# %%
TEXT = """\
GONZALO:
Had I plantation of this isle, my lord,--

ANTONIO:
He'ld sow't with nettle-seed.

SEBASTIAN:
Or docks, or mallows.

GONZALO:
And were the king on't, what would I do?

SEBASTIAN:
'Scape being drunk for want of wine.

GONZALO:
I' the commonwealth I would by contraries
Execute all things; for no kind of traffic
Would I admit; no name of magistrate;
Letters should not be known; riches, poverty,
And use of service, none; contract, succession,
Bourn, bound of land, tilth, vineyard, none;
No use of metal, corn, or wine, or oil;
No occupation; all men idle, all;
And women too, but innocent and pure;
No sovereignty;--

SEBASTIAN:
Yet he would be king on't.

ANTONIO:
The latter end of his commonwealth forgets the
beginning.

GONZALO:
All things in common nature should produce
Without sweat or endeavour: treason, felony,
Sword, pike, knife, gun, or need of any engine,
Would I not have; but nature should bring forth,
Of its own kind, all foison, all abundance,
To feed my innocent people.

SEBASTIAN:
No marrying 'mong his subjects?

ANTONIO:
None, man; all idle: whores and knaves.

GONZALO:
I would with such perfection govern, sir,
To excel the golden age.

SEBASTIAN:
God save his majesty!

ANTONIO:
Long live Gonzalo!

GONZALO:
And,--do you mark me, sir?

ALONSO:
Prithee, no more: thou dost talk nothing to me.

GONZALO:
I do well believe your highness; and
did it to minister occasion to these gentlemen,
who are of such sensible and nimble lungs that
they always use to laugh at nothing.

ANTONIO:
'Twas you we laughed at.

GONZALO:
Who in this kind of merry fooling am nothing
to you: so you may continue and laugh at
nothing still.

ANTONIO:
What a blow was there given!

SEBASTIAN:
An it had not fallen flat-long.

GONZALO:
You are gentlemen of brave metal; you would lift
the moon out of her sphere, if she would continue
in it five weeks without changing.

SEBASTIAN:
We would so, and then go a bat-fowling.

ANTONIO:
Nay, good my lord, be not angry.

GONZALO:
No, I warrant you; I will not adventure
my discretion so weakly. Will you laugh
me asleep, for I am very heavy?

ANTONIO:
Go sleep, and hear us.

ALONSO:
What, all so soon asleep! I wish mine eyes
Would, with themselves, shut up my thoughts: I find
They are inclined to do so.

SEBASTIAN:
Please you, sir,
Do not omit the heavy offer of it:
It seldom visits sorrow; when it doth,
It is a comforter.

ANTONIO:
We two, my lord,
Will guard your person while you take your rest,
And watch your safety.

ALONSO:
Thank you. Wondrous heavy.

SEBASTIAN:
What a strange drowsiness possesses them!

ANTONIO:
It is the quality o' the climate.

SEBASTIAN:
Why
Doth it not then our eyelids sink? I find not
Myself disposed to sleep.

ANTONIO:
Nor I; my spirits are nimble.
They fell together all, as by consent;
They dropp'd, as by a thunder-stroke. What might,
Worthy Sebastian? O, what might?--No more:--
And yet me thinks I see it in thy face,
What thou shouldst be: the occasion speaks thee, and
My strong imagination sees a crown
Dropping upon thy head.

SEBASTIAN:
What, art thou waking?

ANTONIO:
Do you not hear me speak?

SEBASTIAN:
I do; and surely
It is a sleepy language and thou speak'st
Out of thy sleep. What is it thou didst say?
This is a strange repose, to be asleep
With eyes wide open; standing, speaking, moving,
And yet so fast asleep.

ANTONIO:
Noble Sebastian,
Thou let'st thy fortune sleep--die, rather; wink'st
Whiles thou art waking.
"""

lm = kvjax.load("shakespeare", dtype=jnp.float32)
copier = kvjax.load("induction", dtype=jnp.float32).model
ids = np.array(lm.encode(TEXT)[1:], np.int32)
half = 128
windows = 1 + np.arange((len(ids) - half) // half)  # of 256 tokens, each half a window further than the one before
scene = np.stack([[lm.bos_id, *ids[half * (i - 1) :][: 2 * half]] for i in windows])
characters = len(lm.decode(ids[half : half * (len(windows) + 1)].tolist()))
blocks, follows = induction.copy_task(seed=1, rows=8, length=192)
print(f"{len(TEXT):,} characters are {len(ids):,} tokens; {len(windows)} windows of which the second half is scored")
print("a text to copy:", *blocks[0, :40], "…")


# %% [markdown]
# Every token is fed in a call of its own, so that whatever a guess rests on was read from the cache. That is one
# `lax.scan` over `kvjax.step`, compiled once for each kind.


# %%
@jax.jit
def read(model, cache, tokens):  # tokens [B, S] -> log-probabilities [B, S, V] of what follows each
    def one(cache, fed):
        logits, cache = kvjax.step(model, cache, fed)
        return cache, jax.nn.log_softmax(logits)

    cache, found = jax.lax.scan(one, cache, tokens.T)
    return found.swapaxes(0, 1)


def surprise(plan):  # nats per character of the scene
    cache = kvjax.init_cache(lm.model, plan, batch=len(scene), capacity=256)
    guesses = np.asarray(read(lm.model, cache, scene[:, :-1]))
    picked = np.take_along_axis(guesses, scene[:, 1:, None], axis=2)[..., 0]
    return -picked[:, half:].sum(dtype=np.float64) / characters


def copied(plan, model=copier):  # share of the tokens that are determined and guessed right
    guesses = read(model, kvjax.init_cache(model, plan, batch=len(blocks), capacity=192), blocks[:, :-1])
    return float((np.argmax(guesses, axis=2) == blocks[:, 1:])[follows[:, 1:]].mean())


# %%
zoo = {  # label: (plan, group)
    "dense": (caches.dense(), "exact"),
    "paged": (caches.paged(16), "exact"),
    "layer input": (caches.layer_input(), "exact"),
    "bfloat16": (caches.dense(store=jnp.bfloat16), "fewer bits"),
    "int8": (caches.dense(store=codecs.int8()), "fewer bits"),
    "fp8": (caches.dense(store=codecs.fp8()), "fewer bits"),
    "int4": (caches.dense(store=codecs.int4()), "fewer bits"),
    "last 64": (caches.ring(64), "fewer tokens"),
    "last 32": (caches.ring(32), "fewer tokens"),
    "last 16": (caches.ring(16), "fewer tokens"),
    "first 4 + last 16": (caches.ring(16, sinks=4), "fewer tokens"),
    "first 4 + last 64, int8": (caches.ring(64, sinks=4, store=codecs.int8()), "both"),
}


def measured(plan):
    return kvjax.cache_nbytes(lm.model, plan, batch=1, capacity=256) / 256, surprise(plan), copied(plan)


def told(names, found):
    print(f"{'':<25}{'bytes a token':>14}{'nats a character':>18}{'copied':>9}")
    for name in names:
        size, nats, share = found[name]
        print(f"{name:<25}{size:>14,.0f}{nats:>18.4f}{share:>9.1%}")


with ThreadPoolExecutor(2) as workers:  # most of the time goes into compiling, one program a kind and model
    found = dict(zip(zoo, workers.map(measured, [plan for plan, _ in zoo.values()]), strict=True))
told(zoo, found)


# %%
def drawn(found, groups):
    looks = {"exact": (BLUE, "o"), "fewer bits": (ORANGE, "s"), "fewer tokens": (DARK, "D"), "both": ("#A2C8EC", "^")}
    above, below, right = (0, 7, "center"), (0, -15, "center"), (7, -3, "left")
    places = [{"paged": (4, 7, "right"), "dense": (4, -15, "right"), "layer input": above, "int4": above, "fp8": above}]
    places[0].update({"int8": below, "bfloat16": below, "first 4 + last 64, int8": (7, 3, "left")})
    places.append({**places[0], "last 64": (-1, 7, "right"), "fp8": (1, 7, "left"), "first 4 + last 64, int8": above})
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.4), layout="constrained")
    for axis, column, where in zip(axes, (1, 2), places, strict=True):
        axis.axhline(found["dense"][column], color=BLUE, linewidth=1, alpha=0.5, zorder=0)
        for name, numbers in found.items():
            colour, marker = looks[groups[name]]
            axis.scatter(
                numbers[0], numbers[column], color=colour, marker=marker, s=42, edgecolor="black", linewidth=0.5
            )
            dx, dy, align = where.get(name, right)
            at = (numbers[0], numbers[column])
            axis.annotate(name, at, (dx, dy), textcoords="offset points", ha=align, fontsize=8)
        axis.set_xscale("log", base=2)
        axis.set_xticks([128, 256, 512, 1024, 2048, 4096], ["128", "256", "512", "1,024", "2,048", "4,096"])
        axis.set(xlabel="bytes a token", xlim=(90, 5000))
    axes[0].set(ylabel="nats a character", ylim=(1.5785, None), title="A scene of The Tempest (lower is better)")
    axes[1].set(ylabel="share copied right", ylim=(-0.05, 1.12), title="Copying (higher is better)")
    shown = dict.fromkeys(groups[name] for name in found)
    handles = [
        plt.Line2D([], [], color=looks[g][0], marker=looks[g][1], ls="", mec="black", mew=0.5, label=g) for g in shown
    ]
    handles.append(plt.Line2D([], [], color=BLUE, alpha=0.5, label="nothing lost"))
    axes[1].legend(handles=handles, loc="lower right", frameon=False, fontsize=8)
    plt.show()


drawn(found, {name: group for name, (_, group) in zoo.items()})
exact = [found[name][1:] for name, (_, group) in zoo.items() if group == "exact"]
print("the exact kinds agree to", f"{np.ptp([nats for nats, _ in exact]):.0e} nats a character")

# %% [markdown]
# - The **exact** kinds lie on the line: where the numbers are kept (one buffer, pages) or in which form (the layer's
#   input, from which keys and values are projected again) changes bytes and time, never the text.
# - **Fewer bits** cost next to nothing here: the gap between dense and int4 can hardly be seen.
# - **Fewer tokens** show the two tests apart. A window of 32 hardly hurts the scene, and ruins copying wherever a block is
#   longer than the window.
# - **The first tokens are special.** With them, 16 tokens do better on the scene than 64 without. Attention puts what it
#   has no use for on the first token (*attention sinks*, StreamingLLM); a plain window drops it.
# - A kind is a layout times a codec, so a window with sinks in int8 is one word more, and not another implementation.

# %% [markdown]
# ## What hides from four bits
#
# Real models have a few key channels that are much larger than the others. We plant one: in each layer, one rotary
# pair of the keys becomes 20 times as large, and of the queries 20 times smaller. The model computes the same; but a
# code that shares one scale among the channels of a key spends it on the large one. `int4_channels` has a scale for each
# channel instead.

# %%
planted = copier
for layer in range(copier.config.num_layers):
    planted = induction.plant_outlier(planted, layer, pair=1, factor=20.0)

coded = {
    "int8": caches.dense(store=codecs.int8()),
    "fp8": caches.dense(store=codecs.fp8()),
    "int4": caches.dense(store=codecs.int4()),
    "int4_channels": caches.dense(store=codecs.int4_channels(32, residual=32)),
}
shares = np.array([[copied(plan, model) for plan in coded.values()] for model in (copier, planted)])

figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
for row, (label, colour) in enumerate((("as it is", BLUE), ("with an outlier", ORANGE))):
    bars = axis.bar(np.arange(len(coded)) + 0.4 * row - 0.2, shares[row], 0.38, color=colour, label=label)
    axis.bar_label(bars, [f"{share:.1%}" for share in shares[row]], fontsize=8, padding=2)
axis.set_xticks(range(len(coded)), coded)
axis.set(ylabel="share copied right", ylim=(0, 1.15))
axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# ## A paged cache, drawn
#
# A paged cache has one pool of pages for all rows. A row is a list of pages, from anywhere in the pool; rows that begin
# alike can read the same page. Here a page has 8 slots, the pool 12 pages, and up to 4 rows may share one.


# %%
def pool(axis, cache, title):
    pages = cache.shared["pages"]
    readers, index = np.asarray(pages.readers), np.asarray(pages.index)
    lengths, (count, size) = np.asarray(cache.lengths), (len(readers), pages.page)
    for page in range(count):
        x, y = page % 4 * 1.15, -(page // 4) * 1.5
        rows = [row for row in readers[page] if row >= 0]
        filled = max((min(lengths[row] - index[page] * size, size) for row in rows), default=0)
        for slot in range(filled):
            for i, row in enumerate(rows):  # a shared page has a band for each of its readers
                band = (x + slot / size, y + i / len(rows)), 1 / size, 1 / len(rows)
                axis.add_patch(Rectangle(*band, color=COLOURS[row], linewidth=0))
        for slot in range(size):
            axis.add_patch(Rectangle((x + slot / size, y), 1 / size, 1, fill=False, edgecolor="white", linewidth=1))
        edge = DARK if rows else "#CFCFCF"
        axis.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=edge, linewidth=1.2))
        axis.text(x + 0.5, y - 0.08, str(page), ha="center", va="top", fontsize=7, color=DARK)
    table = [[int(page) for page in row if page >= 0] for row in np.asarray(pages.table)]
    lines = [f"row {row}: {lengths[row]:>2} tokens, pages {own or 'none'}" for row, own in enumerate(table)]
    axis.text(0, -3.6, "\n".join(lines), fontsize=8, va="top", family="monospace")
    axis.set(xlim=(-0.1, 4.6), ylim=(-5.0, 1.1), aspect="equal")
    axis.set_title(title, fontsize=10)
    axis.axis("off")


COLOURS = [BLUE, ORANGE, "#A2C8EC"]
rng = np.random.default_rng(0)
cache = kvjax.init_cache(copier, caches.paged(8, pages=12, share=4), batch=1, capacity=64)
_, prompt = kvjax.prefill(copier, cache, rng.integers(0, 64, (1, 20)))
three = jax.jit(lambda cache: cache.fork(3))(prompt)  # three rows that go on from it; jit: one program
_, grown = kvjax.prefill(copier, three, rng.integers(0, 64, (3, 16)), np.array([16, 3, 9]))
later = jax.jit(lambda cache: cache.release(jnp.array([1])).rewind(jnp.array([18, 0, 29])))(grown)

figure, axes = plt.subplots(1, 4, figsize=(12.5, 3.9), layout="constrained")
pool(axes[0], prompt, "a prompt of 20 tokens")
pool(axes[1], three, "three rows fork it")
pool(axes[2], grown, "they go on: 16, 3, 9 tokens")
pool(axes[3], later, "row 1 leaves, row 0 goes back")
rows = [Patch(color=colour, label=f"row {row}") for row, colour in enumerate(COLOURS)]
figure.legend(handles=rows, loc="outside lower center", ncols=3, frameon=False)
plt.show()

# %% [markdown]
# Full pages are shared: kept once, with a band here for each row that reads them. The last page of the prompt will be
# written to, so each row has its own copy of that one. What a row gives back is free for the others (an empty grey
# frame), and nothing else moves. The pool did not grow:

# %%
print([f"{each.nbytes:,} bytes" for each in (three, grown, later)])
assert three.nbytes == grown.nbytes == later.nbytes
tables = np.asarray(grown.shared["pages"].table)
assert (tables[:, :2] == tables[0, :2]).all() and len(
    set(tables[:, 2].tolist())
) == 3  # two shared, the third their own

# %% [markdown]
# ## Write your own kind
#
# A kind is a *node*, what a layer keeps, and a *word* that makes one. A node takes new tokens in and hands back what to
# attend over: the stored keys and values, and **which position each slot holds**. Masks are arithmetic on those positions,
# so it does not matter where a token lies, as long as the node says so.
#
# This one deals the tokens out like cards: position p goes on pile p mod n. Striped Attention (Brandon et al. 2023,
# 2311.09431) deals a long text to several devices in this way, so that each has an equal share of the work.

# %%
from kvjax.caches.base import Kind, Node, views_of
from kvjax.ops.attention import EMPTY  # the position of a slot that holds nothing


@struct.node
class Dealt(Node):
    k: Any  # stores of a codec, piles * size slots each
    v: Any
    piles: int = struct.static()
    size: int = struct.static()

    def slot(self, order):  # where a token goes
        return jnp.where(order == EMPTY, EMPTY, order % self.piles * self.size + order // self.piles)

    def held(self, lengths):  # the inverse: which token each slot holds
        slot = jnp.arange(self.piles * self.size, dtype=jnp.int32)[None, :]
        order = slot % self.size * self.piles + slot // self.size
        return jnp.where(order < lengths[:, None], order, EMPTY)

    def extend(self, h, project, span, shared):
        k, v = project.kv(h, span.positions)
        slots = self.slot(jnp.where(span.real(), span.order, EMPTY))  # padding goes nowhere
        node = self.replace(k=self.k.write(k, slots, span.positions), v=self.v.write(v, slots, span.positions))
        held = self.held(span.end)
        return views_of(node.k.read(held, span.end), node.v.read(held, span.end)), node

    def resize(self, capacity, shared):
        new = self.replace(size=-(-capacity // self.piles))
        order = jnp.arange(min(self.size, new.size) * self.piles, dtype=jnp.int32)[None, :]
        room = self.piles * max(self.size, new.size)

        def dealt_again(store):
            rows = store.unpacked().shape[0]
            before, after = (jnp.repeat(node.slot(order), rows, axis=0) for node in (self, new))
            return store.resize(room).move(before, after).resize(self.piles * new.size)

        return new.replace(k=dealt_again(self.k), v=dealt_again(self.v))

    def move(self, source, target, shared):
        before, after = self.slot(source), self.slot(target)
        return self.replace(k=self.k.move(before, after), v=self.v.move(before, after))

    def contents(self, lengths, shared):  # for looking
        return self.k.unpacked(), self.v.unpacked(), self.held(lengths)


@dataclasses.dataclass(frozen=True)
class DealtKind(Kind):
    piles: int = 3
    store: Any = codecs.plain()

    def init(self, shape, batch, capacity):
        size = -(-capacity // self.piles)
        made = (batch, shape.kv_heads, self.piles * size)
        k, v = (self.store.empty(*made, width, shape.dtype) for width in (shape.key_dim, shape.value_dim))
        return Dealt(k, v, self.piles, size)


# %% [markdown]
# That is all: rewinding, forking, taking rows, saving and the codecs (but `int4_channels`, which asks more of a layout)
# come with it. It fits wherever a kind fits, and lands on the line:

# %%
found["yours"] = measured(DealtKind())
told(("dense", "yours"), found)
assert abs(found["yours"][1] - found["dense"][1]) < 1e-6

# %% [markdown]
# ## Prove it
#
# A number on a line is no proof. `kvjax.testing.suite` is the list of checks that every kind of this library passes, on
# tiny random models: against recomputing everything, bit by bit where that is promised. Here are eight of them;
# `testing.run_suite(case)` without a list runs all.

# %%
jax.config.update("jax_disable_most_optimizations", True)  # many programs that run for milliseconds

from kvjax.testing.cases import FULL

case = testing.Case(
    "dealt in three piles", DealtKind(), config=dataclasses.replace(FULL, num_layers=1, windows=(None,))
)
checks = [promises.same_logits, promises.rewind, promises.idle_rows, promises.neighbours, promises.unused_slots]
checks += [moves.release, moves.resize, moves.types]
report = testing.run_suite(case, checks)
for line, check in zip(report.lines, checks, strict=True):
    print(
        f"{'passed' if line.error is None else 'FAILED'}  {line.check:<14}{check.__doc__.split('. ')[0].split(chr(10))[0]}"
    )
assert report.ok

# %% [markdown]
# ## Watch the mutants die
#
# A check that cannot fail proves nothing either. A *mutant* is your kind with one small thing broken: tokens written one slot
# too far, a rewind that does nothing, rows mixed up. Each must be noticed by some check, and each check must notice
# some mutant.

# %%
names = [
    "start + 1",
    "valid - 1",
    "write clamped",
    "stale positions",
    "mask < for <=",
    "unused slots seen",
    "key position + 1",
    "a neighbour's keys",
    "rewind a no-op",
    "rewind off by one",
    "another dtype after a call",
    "empty once it grew",
]
chosen = [next(mutant for mutant in mutants.MUTANTS if mutant.name == name) for name in names]
assert all(mutant.applies(case) for mutant in chosen)
chosen.append(mutants.NOTHING)  # wrapped like a mutant, and nothing broken: it must live
with ThreadPoolExecutor(2) as workers:
    killed = np.array(
        [*workers.map(lambda mutant: [mutants.kills(check, mutant.of(case)) for check in checks], chosen)]
    )

figure, axis = plt.subplots(figsize=(7.4, 5.2), layout="constrained")
axis.pcolormesh(
    killed[::-1], cmap=plt.matplotlib.colors.ListedColormap(["#EDEDED", ORANGE]), edgecolor="white", linewidth=2
)
axis.set_xticks(np.arange(len(checks)) + 0.5, [check.__name__ for check in checks], rotation=35, ha="right")
axis.set_yticks(np.arange(len(chosen)) + 0.5, [mutant.name for mutant in chosen][::-1])
axis.tick_params(length=0)
axis.spines[["left", "bottom"]].set_visible(False)
axis.set_title("which check kills which mutant")
axis.legend(
    handles=[Patch(color=ORANGE, label="killed"), Patch(color="#EDEDED", label="lives")],
    loc="center left",
    bbox_to_anchor=(1, 0.5),
    frameon=False,
)
plt.show()

dead = killed[:-1].any(axis=1).sum()
print(f"{dead} of {len(chosen) - 1} mutants die; of the one that is not broken, {killed[-1].sum()} checks complain")
assert killed[:-1].any(axis=1).all() and not killed[-1].any() and killed.any(axis=0).all()

# %% [markdown]
# No single check sees them all, which is why there are many. `mutants.killers(case, testing.suite)` runs every mutant that
# applies to a kind against every check.
