# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kvjax/kvjax/blob/main/notebooks/4_draft_rewind_edit_translate.ipynb)
#
# # Draft, rewind, edit, translate
#
# Four things that one can do with a cache that is a value. Guess several tokens and check them in one call. Go back,
# exactly. Change a word in the middle, exactly, and see what happens if one cuts corners. Let many beams read one
# source, and look at what they read.

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
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import kvjax
from kvjax import approximate, caches, costs
from kvjax.testing import induction

plt.style.use(["tableau-colorblind10", {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False}])
jax.config.update("jax_default_matmul_precision", "highest")  # GPUs and TPUs, too, multiply float32 as float32
BLUE, ORANGE, GREY, DARK = "#006BA4", "#FF800E", "#ABABAB", "#595959"

lm = kvjax.load("shakespeare", dtype=jnp.float32)
model, copier = lm.model, kvjax.load("induction", dtype=jnp.float32).model

# %% [markdown]
# ## Draft
#
# A step of a large model takes nearly as long for a few tokens as for one, because reading the weights is what takes the
# time. *Speculative decoding* uses that: something cheap drafts γ tokens, the model checks them all in one call, keeps
# those that it would have said itself, and adds one of its own. The text stays the same; there are fewer calls.
#
# If each draft is kept with probability α, independently of the others, a call gives
# $E = 1 + α + … + α^γ = (1 - α^{γ+1}) / (1 - α)$ tokens (Leviathan et al. 2023, 2211.17192).
# Three ways to draft, each with 1, 2, 4 and 8 drafts a call:
#
# - a **smaller model**, trained to imitate the large one,
# - the **first three layers** of the model itself (of four), whose work the check then goes on from,
# - **looking it up**: what followed the last time that the text read like this? No model at all.

# %%
speakers = "ROMEO:\n|JULIET:\n|First Citizen:\nWe are|KING RICHARD III:\nNow|MENENIUS:\nI tell|GREMIO:\nA thousand"
prompts = speakers.split("|")
drafters = {
    "smaller model": kvjax.draft_model(kvjax.load("shakespeare-draft", dtype=jnp.float32)),
    "first 3 layers": kvjax.early_exit(3),
    "looked up": kvjax.prompt_lookup(ngram=3),
}
DRAFTED = (1, 2, 4, 8)


def written(algorithm=None):
    return kvjax.generate(lm, prompts, max_new_tokens=120, algorithm=algorithm)


plain = written()  # greedy, a token a call
ways = [(name, drafted) for name in drafters for drafted in DRAFTED]
with ThreadPoolExecutor(2) as workers:  # most of the time goes into compiling: a program for each
    runs = [*workers.map(lambda way: written(kvjax.speculate(drafters[way[0]], drafted=way[1])), ways)]

speculated = {}
print(f"{'drafts':<16}{'γ':>3}{'kept, α':>9}{'calls with a draft':>20}{'tokens a call':>15}{'formula':>9}  same text")
for (name, drafted), out in zip(ways, runs, strict=True):
    s = out.speculated
    share, same = s.drafting.sum() / s.calls.sum(), (out.tokens == plain.tokens).all()
    speculated[name, drafted] = s.acceptance, share, s.tokens_per_call
    due = costs.expected_tokens(drafted, s.acceptance)
    print(f"{name:<16}{drafted:>3}{s.acceptance:>9.2f}{share:>20.0%}{s.tokens_per_call:>15.2f}{due:>9.2f}  {same}")
    assert same

# %%
figure, axis = plt.subplots(figsize=(7.6, 4.2), layout="constrained")
at = np.linspace(1, 8, 60)
for name, colour, marker in zip(drafters, (BLUE, ORANGE, DARK), "osD", strict=True):
    alpha, share, _ = np.mean([speculated[name, drafted] for drafted in DRAFTED], axis=0)
    expected = np.array([costs.expected_tokens(drafted, alpha) for drafted in at])
    axis.plot(at, expected, color=colour, linewidth=1.5)
    if share < 0.9:
        axis.plot(at, 1 + share * (expected - 1), color=colour, linewidth=1.2, linestyle="--")
    measured = [speculated[name, drafted][2] for drafted in DRAFTED]
    axis.plot(DRAFTED, measured, marker, color=colour, markersize=7, markeredgecolor="black", markeredgewidth=0.5)
    axis.plot([], [], color=colour, marker=marker, label=f"{name}, α = {alpha:.2f}")
axis.plot([], [], color=GREY, label="the formula")
axis.plot([], [], color=GREY, linestyle="--", label="with calls that have no draft")
axis.plot([], [], "o", color=GREY, label="measured")
axis.set(xlabel="drafts a call, γ", ylabel="tokens a call", xticks=DRAFTED, ylim=(0.9, None))
axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# The two that ask a model lie on the formula. Looking things up lies far below its curve, for a reason that the table
# shows: in many calls there is nothing to look up. Count those as calls that give one token (dashed), and most of the
# gap closes. The rest is that the formula takes drafts to be independent: here a copy that begins well goes on well, so
# that α is larger where more drafts are looked at.
#
# Where a check takes v steps and a draft c of one, the speed-up is E / (v + γ·c). A call of models as small as these is so
# cheap that little is gained; `benchmarks/speculative.py` measures it.
#
# ## Rewind
#
# Drafts that are not kept must leave the cache. Here that is `cache.rewind(lengths)`: to any length, row by row, and what
# is left is **bitwise** what it would be had the dropped tokens never been fed. We feed two rows some text, then
# rubbish, take back a different number of tokens from each, and go on.

# %%
lines = ["To be, or not to be, that is the question", "Let me not to the marriage of true minds admit impediments"]
rows = np.array([lm.encode(line)[:15] for line in lines])
_, start = kvjax.prefill(model, kvjax.init_cache(model, batch=2, capacity=64), rows)

rubbish = start
for token in (7, 8, 9, 10):
    _, rubbish = kvjax.step(model, rubbish, np.array([token, token]))
back = rubbish.rewind(start.lengths)
print("lengths:", *(each.lengths.tolist() for each in (start, rubbish, back)))

logits, want = kvjax.step(model, start, np.array([20, 30]))  # as if nothing had happened
again, got = kvjax.step(model, back, np.array([20, 30]))
live = int(got.lengths[0])
pairs = [(logits, again), *((want.keys(i)[:, :, :live], got.keys(i)[:, :, :live]) for i in range(4))]
same = [np.asarray(one).tobytes() == np.asarray(other).tobytes() for one, other in pairs]
print("logits, and keys of each layer, bit by bit:", same)
assert all(same)

ragged = rubbish.rewind(rubbish.lengths - np.array([1, 4]))  # each row to a length of its own
print("ragged:", ragged.lengths.tolist(), "and the cache it came from:", rubbish.lengths.tolist())

# %% [markdown]
# ## Edit
#
# To change a word in the middle of a text, `kvjax.edit` keeps what stands before it and feeds the rest again. The result
# is that of feeding the new text from the beginning.

# %%
at = np.array([2, 3])  # in each row: To [be], Let [me]
put = np.array([lm.encode(word)[1:] for word in (" go", " him")])
new = rows.copy()
new[[0, 1], at] = put[:, 0]
for before, after in zip(rows, new, strict=True):
    print(f"{lm.decode(before.tolist())!r} becomes {lm.decode(after.tolist())!r}")

edited, _ = kvjax.edit(model, start, at, at + 1, put)
fresh, _ = kvjax.prefill(model, kvjax.init_cache(model, batch=2, capacity=64), new)
near = approximate.splice(model, start, at, at + 1, put)
for name, found in (("edited", edited), ("spliced", near.logits)):
    print(f"{name}: the largest difference of a logit from a fresh start is {np.abs(found - fresh).max():.1e}")

# %% [markdown]
# ### Why splicing fails
#
# The tempting shortcut is **splicing**: compute only the new tokens, and keep the keys and values of what follows, turned
# to its new positions. But those were computed by layers that had read the *old* word. How much that matters is
# best seen where we know what they say. The model `induction` copies: it reads a block of random tokens, then the
# beginning of that block once more, and says what comes next. Now we edit a token of the block itself:

# %%
ROWS, LONG = 128, 128


def edits_of(kind):  # a block, and its beginning once more, as it will be after the edit: what follows is determined
    rng, made = np.random.default_rng(len(kind)), []
    for _ in range(ROWS):
        period = int(rng.integers(16, 49))
        block = rng.permutation(64)[: period + 1]
        at, put = int(rng.integers(4, period - 4)), block[-1:] if kind == "replace" else block[:0]
        text = np.concatenate([block[:period], block[:at], put])
        made.append((np.pad(text, (0, LONG - len(text))), len(text), at, put, block[at + 1]))
    return map(np.stack, zip(*made, strict=True))


def right(logits, follows):
    return float((np.argmax(logits, axis=1) == follows).mean())


kinds, shares = ("replace", "delete"), []
for kind in kinds:
    tokens, lengths, at, put, follows = edits_of(kind)
    _, cache = kvjax.prefill(copier, kvjax.init_cache(copier, batch=ROWS, capacity=LONG), tokens, lengths)
    exact, _ = kvjax.edit(copier, cache, at, at + 1, put)
    spliced = approximate.splice(copier, cache, at, at + 1, put)
    refreshed = approximate.refresh(copier, spliced.cache, at + put.shape[1], np.ones(ROWS, int))
    shares.append([right(each, follows) for each in (exact, spliced.logits, refreshed.logits)])

figure, axis = plt.subplots(figsize=(7.4, 3.2), layout="constrained")
labels = ("edited: exact", "spliced", "spliced, then one token refreshed")
for i, (label, colour) in enumerate(zip(labels, (BLUE, ORANGE, "#A2C8EC"), strict=True)):
    bars = axis.bar(
        np.arange(len(kinds)) + 0.28 * (i - 1), [each[i] for each in shares], 0.26, color=colour, label=label
    )
    axis.bar_label(bars, [f"{each[i]:.0%}" for each in shares], fontsize=8, padding=2)
axis.set_xticks(range(len(kinds)), [f"a token {kind}d" for kind in kinds])
axis.set(ylabel="share of next tokens right", ylim=(0, 1.15))
axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# The model finds the next token by a key that says *which token stood before me*. After a splice that key still names
# the old token. One token behind the edit computed again (`approximate.refresh`) puts this model right, because it keeps
# nothing else of the past in its keys. A model of language keeps more, and further behind:

# %%
scenes = np.asarray(plain.cache.tokens)[:, :96].reshape(-1, 48)  # two pieces of each text from above
at, rest = 31, 16
put = np.roll(scenes[:, at], 2)[:, None]  # a token from another text
_, cache = kvjax.prefill(model, kvjax.init_cache(model, batch=len(scenes), capacity=64), scenes)
fresh, _ = kvjax.edit(model, cache, at, at + 1, put)
spliced = approximate.splice(model, cache, at, at + 1, put)
counts, errors = np.arange(rest + 1), []
for count in counts:  # of the 16 tokens behind the edit, computed again
    near = spliced if count == 0 else approximate.refresh(model, spliced.cache, at + 1, int(count))
    errors.append(np.abs(near.logits - fresh).max(axis=1))
errors = np.array(errors)

figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
axis.plot(counts, errors, color=GREY, linewidth=0.8)
axis.plot(counts, np.median(errors, axis=1), color=BLUE, marker="o", markersize=4, label="median")
axis.plot([], [], color=GREY, linewidth=0.8, label="each of the texts")
axis.set(
    yscale="log",
    xlabel="tokens behind the edit that are computed again, of 16 (and always the last one)",
    ylabel="largest error of a logit",
)
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# Only all of them together are exact, and that is what `kvjax.edit` does. What lies in `kvjax.approximate` says in its
# name what it is, and `.divergence(model)` of a result says how far off it is.
#
# ## Translate
#
# An encoder-decoder model reads a source, and a beam search keeps several answers at once that all read *the same*
# source. Its keys and values are projected once, and kept once, however many beams read them. `ar2en` writes Arabic
# names in Latin letters.

# %%
translator = kvjax.load("ar2en", dtype=jnp.float32)
names = ["محمد", "فاطمة", "أنطونين", "إيفرسون"]
out = kvjax.generate(translator, names, algorithm=kvjax.beam(4, returned=3), max_new_tokens=16)
for row in out.candidates:
    print("   ".join(f"{each.text} ({each.score:.2f})" for each in row))

# %%
letters = [translator.encode(name) for name in names]
longest = max(map(len, letters))
padded = np.array([row + [0] * (longest - len(row)) for row in letters])
source = kvjax.encode(translator.model, padded, np.array([len(row) for row in letters]))  # the encoder runs once
begun = kvjax.init_cache(translator.model, source=source, capacity=24)
_, prompt = kvjax.prefill(model, kvjax.init_cache(model, capacity=96), scenes[:2].reshape(1, 96))

beams = (1, 2, 4, 8)


def copied(cache, n, room):  # every row with all of it
    return cache.take(np.repeat(np.arange(cache.batch), n)).resize(room)


def nbytes(change, cache, *numbers):  # nothing is computed
    return jax.eval_shape(lambda cache: change(cache, *numbers), cache).nbytes


sizes = {
    "the sources of 4 names": (
        [nbytes(copied, begun, n, 24) for n in beams],
        [nbytes(kvjax.Cache.fork, begun, n) for n in beams],
    ),
    "a prompt of 96 tokens": (
        [nbytes(copied, prompt, n, 160) for n in beams],
        [nbytes(kvjax.branched, prompt, n) for n in beams],
    ),
}
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
for axis, (title, (copies, shared)) in zip(axes, sizes.items(), strict=True):
    axis.plot(beams, np.array(copies) / 1e3, "s-", color=ORANGE, label="a copy for each beam")
    axis.plot(beams, np.array(shared) / 1e3, "o-", color=BLUE, label="kept once")
    axis.set(xlabel="beams", ylabel="kB", xticks=beams, ylim=(0, None), title=title)
    axis.yaxis.set_major_formatter("{x:,.0f}")
axes[0].legend(frameon=False)
plt.show()
for title, (copies, shared) in sizes.items():
    print(f"{title}, 8 beams: {copies[-1]:,} bytes as copies, {shared[-1]:,} kept once")

# %% [markdown]
# What still grows on the blue lines is each beam's own text and the room for more of it. When the search reorders its
# beams, only that moves:

# %%
forked = begun.fork(4)
moved = forked.reorder(np.array([1, 0, 3, 2, *range(4, 16)]))
print("the source after a reordering is the same arrays:", moved.shared["source"] is forked.shared["source"])
assert moved.shared["source"] is forked.shared["source"]

# %% [markdown]
# ### What it reads while it writes
#
# The weights of cross-attention say which source letters each written letter was read from. A *traced* cache keeps the
# stream at named places, so that the queries can be computed afterwards; the keys lie in the cache. To be sure that
# these are the weights that the model used, we take the mean of the values by them, in NumPy, and compare with what
# the layer really added to its stream.

# %%
sites = ("after_self_attention", "after_cross_attention")
answers = [[*translator.start_ids, *row[0].tokens] for row in out.candidates]
valid = np.array([len(row) for row in answers])
fed = np.array([row + [0] * (valid.max() - len(row)) for row in answers])
traced = kvjax.init_cache(translator.model, caches.traced(caches.dense(), sites=sites), source=source, capacity=24)
_, traced = kvjax.prefill(translator.model, traced, fed, valid)

config, kept = translator.model.config, traced.shared["source"]
heads, width = config.query_heads, config.head_dim


def attention_maps(layer):  # weights [B, H, T, S] of targets over source letters
    params = jax.tree.map(np.asarray, translator.model.params["layers"][str(layer)])
    before, after = (np.asarray(traced.trace(layer, site)) for site in sites)  # [B, T, M]
    read = np.asarray(config.norm(params["cross_norm"], before))
    q = read @ params["cross"]["q"]["kernel"] + params["cross"]["q"]["bias"]
    q = q.reshape(*q.shape[:2], heads, width).swapaxes(1, 2)  # [B, H, T, D]
    k, v = (np.asarray(store[layer].unpacked()) for store in (kept.k, kept.v))  # [B, H, S, D]
    scores = q @ k.swapaxes(2, 3) / np.sqrt(width)
    scores[
        np.broadcast_to(np.arange(k.shape[2]) >= np.asarray(kept.lengths)[:, None, None, None], scores.shape)
    ] = -np.inf
    weights = np.exp(scores - scores.max(axis=3, keepdims=True))
    weights /= weights.sum(axis=3, keepdims=True)

    gave = (weights @ v).swapaxes(1, 2).reshape(before.shape)
    gave = gave @ params["cross"]["out"]["kernel"] + params["cross"]["out"]["bias"]
    off = max(np.abs(before[i, :n] + gave[i, :n] - after[i, :n]).max() for i, n in enumerate(valid))
    print(
        f"layer {layer}: rows sum to 1 within {np.abs(weights.sum(axis=3) - 1).max():.0e}, the stream is off by {off:.0e}"
    )
    assert off < 1e-4
    return weights


maps = [attention_maps(layer) for layer in range(config.num_layers)]

# %% [markdown]
# The mean over the heads of the last layer: a row for each letter that is written, from top to bottom, and the Arabic
# name above, from right to left as it is read. The weights go down the diagonal, nearly. Short vowels are not written
# in Arabic: look at what the model reads while it makes one up.

# %%
figure, axes = plt.subplots(1, len(names), figsize=(12.5, 4.2), layout="constrained")
for row, axis in enumerate(axes):
    shown = maps[-1][row, :, : valid[row] - 1, : len(letters[row])].mean(axis=0)
    image = axis.imshow(shown, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    latin = [translator.decode([token]) or "end" for token in answers[row][1:]]
    axis.set_xticks(range(len(letters[row])), [translator.decode([token]) for token in letters[row]], fontsize=15)
    axis.set_yticks(range(len(latin)), latin, fontsize=11)
    axis.xaxis.tick_top()
    axis.invert_xaxis()
    axis.tick_params(length=0)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.set_xlabel(out.text[row], fontsize=11)
figure.colorbar(image, ax=axes, label="weight", pad=0.01)
plt.show()
