# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kvjax/kvjax/blob/main/notebooks/2_what_can_we_cache.ipynb)
#
# # What can we cache?
#
# When a Transformer writes its next token, most of what it needs has been computed before. This notebook finds out by
# differentiation *which* tensors are needed again, proves that they never change, compares what could be kept instead of
# them, and puts right what is often said of the costs.

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
import statistics
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display
from matplotlib.colors import LogNorm

import kvjax
from kvjax import caches, costs, donating, strategies
from kvjax.costs import example as example_sizes

try:
    from jax import enable_x64
except ImportError:  # older than 0.10
    from jax.experimental import enable_x64

plt.style.use(["tableau-colorblind10", {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False}])
jax.config.update("jax_default_matmul_precision", "highest")  # GPUs and TPUs, too, multiply float32 as float32
GREY, INK = "#b8b8b8", "#333333"


def table(head, *rows):
    """Shows a table; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    display(Markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)))


# %% [markdown]
# ## Which tensors does a later token need?
#
# Ask the derivative. Below is a Transformer of two layers written out in full, with the weights of a small trained model
# that comes with the package. To every intermediate a *tap* is added, an array of zeros. The Jacobian of the last
# token's logits with respect to a tap says how that intermediate, at each position, reaches the last token.

# %%
small = kvjax.load("induction", dtype=jnp.float32).model
TOKENS = jnp.asarray([7, 21, 40, 3, 18, 7, 21, 33])
S = len(TOKENS)


def last_logits(taps, kept):
    """Logits of the last token. `kept`: keys and values of earlier positions come from a cache, as constants."""
    c, params = small.config, small.params
    heads, d = c.query_heads, c.head_dim
    turns = c.positions.tables(jnp.arange(S)[None, :], d, jnp.float32)
    earlier = (jnp.arange(S) < S - 1)[:, None, None]
    causal = (jnp.arange(S)[:, None] >= jnp.arange(S)[None, :])[None]

    def turned(x):
        return c.positions.rotate(x[None], turns)[0]

    def cached(x):
        return jnp.where(earlier & kept, jax.lax.stop_gradient(x), x)

    x = params["embed"]["table"][TOKENS]
    for layer in range(c.num_layers):
        p, tap = params["layers"][str(layer)], lambda name, value, layer=layer: value + taps[f"{name} {layer + 1}"]
        x = tap("layer input", x)
        h = c.norm(p["attn_norm"], x)
        q, k, v = jnp.split(h @ p["attn"]["qkv"]["kernel"], [heads * d, (heads + c.kv_heads) * d], axis=-1)
        q = tap("Q", turned(q.reshape(S, heads, d)))
        k = tap("K", cached(turned(k.reshape(S, c.kv_heads, d))))
        v = tap("V", cached(v.reshape(S, c.kv_heads, d)))
        k_all, v_all = (jnp.repeat(each, heads // c.kv_heads, axis=1) for each in (k, v))
        scores = tap("rows of QKᵀ", jnp.einsum("qhd,khd->qhk", q, k_all) * d**-0.5)  # a row belongs to its query
        weights = tap("softmax", jax.nn.softmax(jnp.where(causal.swapaxes(0, 1), scores, -jnp.inf), axis=-1))
        read = jnp.einsum("qhk,khd->qhd", weights, v_all).reshape(S, heads * d)
        x = tap("after attention", x + read @ p["attn"]["out"]["kernel"])
        gate, up = jnp.split(c.norm(p["ffn_norm"], x) @ p["ffn"]["gate_up"]["kernel"], 2, axis=-1)
        x = x + tap("inside the FFN", c.activation(gate) * up) @ p["ffn"]["down"]["kernel"]
    return (c.norm(params["final_norm"], x) @ params["embed"]["table"].T)[-1]


c = small.config
WIDTHS = {
    "layer input": (c.width,),
    "Q": (c.query_heads, c.head_dim),
    "K": (c.kv_heads, c.head_dim),
    "V": (c.kv_heads, c.head_dim),
    "rows of QKᵀ": (c.query_heads, S),
    "softmax": (c.query_heads, S),
    "after attention": (c.width,),
    "inside the FFN": (c.ffn_width,),
}
TAPS = {f"{name} {layer + 1}": jnp.zeros((S, *width)) for layer in range(2) for name, width in WIDTHS.items()}
np.testing.assert_allclose(last_logits(TAPS, False), kvjax.forward(small, TOKENS[None])[0, -1], atol=1e-4)

jacobian = jax.jit(jax.jacobian(last_logits))


def influence(kept):
    """Largest derivative of any logit by anything at a position: `[taps, S]`."""
    found = jacobian(TAPS, kept)
    return np.stack([np.abs(np.asarray(found[name])).max(axis=(0, *range(2, found[name].ndim))) for name in TAPS])


whole, with_cache = influence(False), influence(True)

# %%
fig, panels = plt.subplots(1, 2, figsize=(8.2, 4.2), sharey=True, constrained_layout=True)
shades = plt.get_cmap("cividis_r").with_extremes(bad="white")
titles = ("everything computed again", "keys and values of earlier positions kept")
for axes, values, title in zip(panels, (whole, with_cache), titles, strict=True):
    image = axes.imshow(
        np.where(values > 0, values, np.nan),
        cmap=shades,
        norm=LogNorm(whole[whole > 0].min(), whole.max()),
        aspect="auto",
    )
    for row, at in np.argwhere(values == 0):
        axes.text(at, row, "0", ha="center", va="center", color="#999999", fontsize=8)
    axes.axhline(len(WIDTHS) - 0.5, color=INK, linewidth=1)
    axes.axvline(S - 1.5, color=INK, linewidth=1, linestyle=":")
    axes.set_title(title, fontsize=10)
    axes.set_xticks(range(S), [*range(S - 1), "last"])
    axes.set_xlabel("position")
panels[0].set_yticks(range(len(TAPS)), [f"{name[:-2]}, layer {name[-1]}" for name in TAPS], fontsize=9)
fig.colorbar(image, ax=panels, label="influence on the last token (log)", shrink=0.8)
plt.show()

needed = {name[:-2] for name, row in zip(TAPS, with_cache, strict=True) if row[:-1].any()}
print("what a step needs of earlier positions, once these are kept:", sorted(needed))

# %% [markdown]
# Zeros are exact zeros. Look at layer 2, on the left: of the earlier positions only its input, its keys and its values
# reach the last token. **Queries do not**, nor do **rows of QKᵀ**: row *i* of QKᵀ says what token *i* looks at, and
# token *i* has looked already. A new token brings a query and a row of its own. (In layer 1 the first query is without
# influence, too: the first token sees one key, and a softmax of one number is 1.)
#
# In layer 1 queries do matter on the left – but only because they shape the input of layer 2, and with it its keys and
# values. On the right those are kept, and then nothing of the past is needed but K and V, in every layer.
#
# The left side also shows the other choice: the layer's *input* is enough, because K and V can be made from it again.

# %% [markdown]
# ## The proof: a prefix never changes
#
# One may keep something only if later tokens leave it as it is. So change the end of a text, and compare everything
# that was computed at every position, to the bit. `hybrid()` keeps keys, values and the stream between sub-layers.
#
# The strip below is the control: an *encoder* reads in both directions, and there one changed letter changes all.

# %%
lm = kvjax.load("shakespeare", dtype=jnp.float32)
text = lm.encode("To be, or not to be, that is the question")
AT = len(text) - 3
changed = [*text[:AT], *lm.encode("ROMEO and JULIET")[1 : 1 + len(text) - AT]]


def intermediates(ids):
    _, cache = kvjax.prefill(lm.model, kvjax.init_cache(lm.model, caches.hybrid(), capacity=32), [ids])
    found = {"embedding": cache.trace(0, "embedding")}
    for layer in range(4):
        found[f"K, layer {layer + 1}"] = cache.keys(layer).swapaxes(1, 2)
        found[f"V, layer {layer + 1}"] = cache.values(layer).swapaxes(1, 2)
        found[f"after attention, layer {layer + 1}"] = cache.trace(layer, "after_self_attention")
        found[f"after FFN, layer {layer + 1}"] = cache.trace(layer, "after_ffn")
    return {name: np.asarray(value[0, : len(ids)]).reshape(len(ids), -1) for name, value in found.items()}


def differs(before, after):
    """Positions `[S]` where any bit differs."""
    return np.array([x.tobytes() != y.tobytes() for x, y in zip(before, after, strict=True)])


before, after = intermediates(text), intermediates(changed)
decoder_differs = np.stack([differs(before[name], after[name]) for name in before])

translator = kvjax.load("ar2en", dtype=jnp.float32)
name = translator.encode("محمد")
other = [*name[:-1], name[0]]
states = [
    np.asarray(kvjax.encode(translator.model, jnp.asarray([ids])).states[0, : len(name)]) for ids in (name, other)
]
encoder_differs = differs(*states)[None]

# %%
fig, (above, below) = plt.subplots(2, 1, figsize=(8, 3.9), height_ratios=(17, 1), constrained_layout=True)
pieces = [lm.decode([each]).strip() or "␣" for each in text]
for axes, values, labels in ((above, decoder_differs, list(before)), (below, encoder_differs, ["encoder states"])):
    axes.pcolormesh(values, cmap="gray_r", vmin=0, vmax=1.6, edgecolors="#dddddd", linewidth=0.5)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(labels)) + 0.5, labels, fontsize=7.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
above.set_xticks(np.arange(len(text)) + 0.5, pieces)
above.axvline(AT, color="C1", linewidth=2)
above.set_title("decoder: tokens from the line on were changed; grey where any bit differs", fontsize=10)
below.set_xticks(np.arange(len(name)) + 0.5, range(len(name)))
below.set_title("encoder: the last token was changed", fontsize=10)
plt.show()
print("decoder, bits changed before the line:", int(decoder_differs[:, :AT].sum()), "of", decoder_differs[:, :AT].size)
print("encoder, positions changed:", int(encoder_differs.sum()), "of", encoder_differs.size)
assert not decoder_differs[:, :AT].any() and decoder_differs[:, AT:].all() and encoder_differs.all()

# %% [markdown]
# `kvjax.testing` has the other promises as tests that run on a model, or a kind of cache, of your own.

# %% [markdown]
# ## What could be kept, and what it costs
#
# | kept | a step then has to |
# |---|---|
# | nothing | run the whole text again |
# | keys and values | compute one token and read them |
# | layer inputs | also make all keys and values again – or let queries meet the inputs directly (*absorbed*) |
# | layer outputs | the same: an output is the next layer's input |
# | K/V and the stream (*hybrid*) | what K/V have to, and can resume at any layer |
#
# With an encoder there is a second choice: the source's keys and values, or the encoder's output, from which they can be
# made. `kvjax.costs` predicts bytes and FLOPs of each; the cells below count and time the same, and draw all of it
# relative to K/V. Predicted bytes and FLOPs are equal to what is counted, so one mark stands for both. (`kvjax compare`
# does this on a model of yours.)

# %%
BATCH, SLOTS, NEW = 2, 256, 16
shape = dataclasses.replace(lm.model.config, num_layers=2, windows=())
decoder_only = strategies.without_rotation(shape, SLOTS)  # random weights; learned positions allow all kinds
encoder_decoder = strategies.with_encoder(shape, SLOTS)
source = kvjax.encode(encoder_decoder, np.random.default_rng(0).integers(0, shape.vocab_size, (BATCH, SLOTS)))


def measured(model, strategy, source=None):
    """Bytes and FLOPs a token, each predicted and counted, the median of seconds a token, and the tokens."""
    kept, room = strategy.source, {"batch": BATCH, "capacity": SLOTS}
    cross = None if source is None else kept.cross
    cache = kvjax.init_cache(model, strategy.plan, source=source, cross=cross, **room)
    nbytes = strategy.nbytes(model.config, store=jnp.float32, **room)
    flops = strategy.flops(model.config, batch=BATCH, slots=SLOTS)
    if source is not None:
        rows, slots, _ = source.states.shape
        nbytes += kept.nbytes(model.config, source=slots, rows=rows, store=jnp.float32)
        queries = SLOTS if strategy.whole else 1
        flops += kept.flops(model.config, source=slots, rows=rows, batch=BATCH, queries=queries)
    assert nbytes == cache.nbytes
    assert flops == costs.count_flops(kvjax.step, model, cache, jnp.zeros(BATCH, jnp.int32))
    # A step reads all slots, whatever is in them: an empty cache takes as long as a full one.
    logits, seconds = jnp.zeros((BATCH, shape.vocab_size)), []
    for round in range(4 if strategy.whole else 16):  # the first one compiles
        began = time.perf_counter()
        tokens, _, cache = jax.block_until_ready(donating.decode(model, cache, logits, steps=NEW))
        seconds.append((time.perf_counter() - began) / NEW)
        cache = jax.block_until_ready(cache.rewind([0] * BATCH))
    return nbytes, flops.contractions / BATCH, statistics.median(seconds[1:]) / BATCH, np.asarray(tokens)


of_text = {each.name: measured(decoder_only, each) for each in strategies.STRATEGIES}
chosen = [each for each in strategies.WITH_SOURCE if each.name not in ("input, source K/V", "sub-layers, source K/V")]
of_source = {each.name: measured(encoder_decoder, each, source) for each in chosen}
for found in (of_text, of_source):
    same = all((each[3] == found["none"][3]).all() for each in found.values())
    rows = [(name, f"{b:,}", f"{f / 1e6:,.2f}", f"{1e3 * s:.3f}") for name, (b, f, s, _) in found.items()]
    print("the same tokens, whatever is kept:", same)
    table(("what is kept", "bytes", "MFLOP a token", "ms a token"), *rows)

# %%
fig, panels = plt.subplots(1, 2, figsize=(9, 3.5), constrained_layout=True)
MARKS = (
    ("bytes, predicted = counted", "s", "C0"),
    ("FLOPs, predicted = counted", "D", "C1"),
    ("time, measured", "o", INK),
)
for axes, found, of, title in zip(
    panels, (of_text, of_source), ("K/V", "K/V, source K/V"), ("decoder-only", "encoder-decoder"), strict=True
):
    names = list(found)[::-1]
    for row, name in enumerate(names):
        values = [x / y for x, y in zip(found[name][:3], found[of][:3], strict=True)]
        axes.plot([min(values), max(values)], [row, row], color="#dddddd", linewidth=3, zorder=1)
        for value, up, (_, mark, colour) in zip(values, (0.18, 0, -0.18), MARKS, strict=True):
            axes.scatter(value, row + up, marker=mark, color=colour, s=38, zorder=2)
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("times that of K/V (log)")
    axes.set_title(title, fontsize=10)
handles = [plt.Line2D([], [], marker=mark, color=colour, linestyle="") for _, mark, colour in MARKS]
fig.legend(handles, [name for name, _, _ in MARKS], loc="outside lower center", ncols=3, frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# - K/V do the least work. Keeping inputs or outputs saves nothing on top, and with few key-value heads, as here, they
#   are larger as well.
# - *source projected* does far more work, yet hardly takes longer: in one compiled loop the compiler sees that the source
#   never changes, and projects it once. In a call for each token it cannot.
#
# Over the length of the text the choice only grows clearer. This is the work for one more token in the textbook's
# model (below), by the formulas:

# %%
TEXTBOOK = dataclasses.replace(costs.TEXTBOOK, encoder=None)
lengths = np.unique(np.geomspace(1, 16_384, 40).astype(int))
LINES = {
    "nothing kept": (costs.recompute_flops, "C1", "-"),
    "layer inputs, projected": (costs.reprojected_flops, "C3", "--"),
    "layer inputs, absorbed": (costs.absorbed_flops, "C4", "-."),
    "K/V": (costs.kv_flops, "C0", "-"),
}
fig, axes = plt.subplots(figsize=(6.8, 3.1), constrained_layout=True)
for name, (flops, colour, line) in LINES.items():
    work = [dataclasses.replace(flops(TEXTBOOK, slots=int(t)), head=0).contractions for t in lengths]
    axes.loglog(lengths, work, line, color=colour)
    axes.annotate(
        name, (lengths[-1], work[-1]), (6, 0), textcoords="offset points", va="center", color=colour, fontsize=9
    )
turn = costs.attention_equals_linear_at(TEXTBOOK)
axes.axvline(turn, color=INK, linewidth=0.8, linestyle=":")
told = f"attention is half of\nthe work with K/V:\nt = {turn:,.0f}"
axes.text(0.9 * turn, 4e12, told, ha="right", va="top", fontsize=8, color=INK)
axes.set(xlabel="tokens so far (t)", ylabel="FLOPs for the next token")
plt.show()

# %% [markdown]
# ## Four tokens, step by step
#
# The textbook's worked example: one head, queries and keys of two numbers each, and no scaling. As a model of one's own
# it takes a few lines: `kvjax.attend` writes, masks and reads, with any kind of cache.

# %%
Q = K = np.array([[1, 0], [0, 1], [1, 1], [2, 2]], np.float32)
V = np.array([[0, 1], [1, 0], [1, 1], [2, 2]], np.float32)


def apply(params, config, cache, tokens, valid):
    x = params[tokens]  # a token's embedding has its key and its value side by side
    k, v = x[:, :, None, :2], x[:, :, None, 2:]
    out, cache = kvjax.attend(cache, 0, q=k, kv=(k, v), scale=1.0)
    return jnp.pad(out[:, :, 0], ((0, 0), (0, 0), (0, 2))), cache  # as wide as the vocabulary of four


example = kvjax.Model(jnp.asarray(np.hstack([K, V])), None, apply)
cache, outputs, kept = kvjax.init_cache(example, capacity=4), [], []
for token in range(4):
    kept.append((np.asarray(cache.keys(0)[0, 0, :token]), np.asarray(cache.values(0)[0, 0, :token])))
    out, cache = kvjax.step(example, cache, [token])
    outputs.append(np.asarray(out[0, :2]))
np.testing.assert_allclose(outputs, kvjax.forward(example, [[0, 1, 2, 3]])[0, :, :2], rtol=1e-6)

# %%
NEW_COLOUR, OLD_COLOUR, LINE = "#8ec7e8", "#e8e8e8", {"edgecolor": "white", "linewidth": 1.5}


def draw(axes, left, top, values, title, colours):
    """A matrix of numbers, a colour per row; NaN is an empty place."""
    axes.text(left + values.shape[1] / 2, top - 0.35, title, ha="center", va="bottom", fontsize=9)
    for (i, j), value in np.ndenumerate(values):
        empty = np.isnan(value)
        axes.add_patch(plt.Rectangle((left + j, top + i), 1, 1, facecolor="white" if empty else colours[i], **LINE))
        if not empty:
            ink = INK if colours[i] != OLD_COLOUR else "#666666"
            axes.text(left + j + 0.5, top + i + 0.5, f"{value:.3g}", ha="center", va="center", fontsize=9, color=ink)


fig, panels = plt.subplots(1, 4, figsize=(9, 5.1), constrained_layout=True)
for token, axes in enumerate(panels):
    keys, values = (np.vstack([old, new[token]]) for old, new in zip(kept[token], (K, V), strict=True))
    colours = [OLD_COLOUR] * token + [NEW_COLOUR]
    scores = np.full((4, 4), np.nan)
    for i in range(token + 1):
        scores[i, : i + 1] = Q[i] @ K[: i + 1].T
    weights = np.exp(scores[token, : token + 1]) / np.exp(scores[token, : token + 1]).sum()
    np.testing.assert_allclose(weights @ values, outputs[token], rtol=1e-5)
    fill = [*colours, *["white"] * (3 - token)]
    draw(axes, 0, 0, keys, "K", colours)
    draw(axes, 2.6, 0, values, "V", colours)
    draw(axes, 0.3, 5.4, scores, "QKᵀ", fill)
    told = ("softmax", weights), ("output", outputs[token])
    for (word, numbers), y in zip(told, (10.4, 11.3), strict=True):
        axes.text(-0.6, y, f"{word}   {'  '.join(f'{number:.2f}' for number in numbers)}", fontsize=8.5, color=INK)
    axes.set(xlim=(-0.7, 5), ylim=(11.5, -1.4), aspect="equal")
    axes.set_title(f"token {token + 1}", fontsize=10)
    axes.axis("off")
patches = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (NEW_COLOUR, OLD_COLOUR)]
fig.legend(
    patches,
    ["computed in this step", "K and V: read from the cache; QKᵀ: never needed again"],
    loc="outside lower center",
    ncols=2,
    frameon=False,
    fontsize=9,
)
plt.show()

# %% [markdown]
# Each step needs all of K and V, and one new row of QKᵀ. The grey rows of QKᵀ belong to tokens that have looked already.

# %% [markdown]
# ## Sentences that are often said, put right
#
# Most of these go with the textbook's example, an encoder-decoder. Each number on the right is computed in the cell.

# %%
t = example_sizes.POSITIONS
lines = {line.kept: line for line in costs.textbook()}
kv, outs, both = (lines[name] for name in ("K/V of text and source", "outputs of the layers", "both of these"))
everything = lines["K/V and all sub-layers"].float32 / outs.float32
one = costs.layer_flops(TEXTBOOK, t)
again = costs.reprojected_flops(TEXTBOOK, slots=t).contractions / costs.kv_flops(TEXTBOOK, slots=t).contractions
speedup = {n: costs.without_cache_flops(TEXTBOOK, n) / costs.with_kv_flops(TEXTBOOK, n) for n in (10, 256, 4096)}
growth = costs.with_kv_flops(TEXTBOOK, 2_000_000) / costs.with_kv_flops(TEXTBOOK, 1_000_000)
batch = costs.kv_flops(TEXTBOOK, slots=t, batch=8).contractions / costs.kv_flops(TEXTBOOK, slots=t).contractions
fp8 = np.array([448, 465], np.float32).astype(jnp.float8_e4m3fn).astype(np.float32).tolist()

display(
    Markdown(
        f"""
Width {TEXTBOOK.width}, {TEXTBOOK.num_layers} layers, {example_sizes.BATCH} rows, {t} positions of source and of target:

| often said | right |
|---|---|
| the cache of the example has 24 MB | {kv.float32:,} bytes in float32; {kv.said} MB would be {kv.element:.2f} bytes a number |
| the layers' outputs have 12 MB | {outs.float32:,} bytes: K/V are {kv.float32 / outs.float32:g} times that |
| both have 36 MB a sample | {both.float32 / example_sizes.BATCH:,.0f} bytes a sample |
| to cache everything costs 3 widths a position and layer | {everything:g} widths |
| a token costs O(d²) with a cache | d² and t · d: attention is half of the work at t = {turn:,.0f} |
| n tokens become linear | still quadratic: twice a million tokens are {growth:.1f} times the work |
| attention is the expensive part | at t = {t} the FFN does {one.ffn / one.scores:.0f} times the work of the scores |
| ten times faster | by length: {", ".join(f"{ratio:,.0f} at {n:,} tokens" for n, ratio in speedup.items())} (FLOPs) |
| the cost does not depend on the batch | 8 rows are {batch:g} times the FLOPs; only the weights are read once |
| keeping layer outputs makes decoding faster | at t = {t} a step does {again:.0f} times the work of one with K/V |
| float8 reaches ±240 | e4m3 in JAX reaches ±{fp8[0]:g}; 465 becomes {fp8[1]} |
"""
    )
)

# %% [markdown]
# ## Is cached *equal* to recomputed?
#
# In real numbers, yes. On a computer the sums are taken in another order, and every order rounds differently. The same
# text, token by token through the cache and all at once without one, in three precisions:

# %%
text = kvjax.generate(lm, "ROMEO:", max_new_tokens=90, seed=1, sampler=kvjax.sampling.chain()).tokens[0].tolist()


def apart(dtype):
    """Largest difference of a logit at each position, of the largest logit."""
    model = jax.tree.map(lambda x: x.astype(dtype), lm.model)
    whole = np.asarray(kvjax.forward(model, [text])[0], np.float64)
    cache, found = kvjax.init_cache(model, capacity=len(text)), []
    for token in text:
        logits, cache = kvjax.step(model, cache, [token])
        found.append(np.asarray(logits[0], np.float64))
    return np.abs(np.stack(found) - whole).max(axis=1) / np.abs(whole).max(), whole.argmax(1) == np.argmax(found, 1)


with enable_x64(True):
    differences = {"float64": apart(jnp.float64)}
differences |= {name: apart(dtype) for name, dtype in (("float32", jnp.float32), ("bfloat16", jnp.bfloat16))}

# %%
fig, axes = plt.subplots(figsize=(7, 3.1), constrained_layout=True)
for (name, (values, agree)), colour in zip(differences.items(), ("C0", "C1", INK), strict=True):
    axes.semilogy(np.maximum(values, 1e-18), ".", color=colour, markersize=5)
    axes.axhline(float(jnp.finfo(name).eps), color=colour, linewidth=0.8, linestyle=":")
    axes.annotate(
        name,
        (len(text), np.median(values)),
        (6, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        annotation_clip=False,
    )
    print(
        f"{name:8}  largest difference {values.max():.0e} of the largest logit; same greedy choice at {agree.sum()} of {len(agree)} positions"
    )
axes.set(xlabel="position", ylabel="difference / largest logit", xlim=(-1, len(text)))
axes.set_title("cached against recomputed; dotted: the spacing of numbers at 1", fontsize=10)
plt.show()

# %% [markdown]
# So "the same tokens" is a promise for float64 and float32, where only a near tie of two tokens could turn. In bfloat16
# small differences are first rounded away; once one falls on the other side it stays in the cache, and all later
# positions read it. The difference stays about as large as what bfloat16 rounds anyway.

# %% [markdown]
# ## When not to cache
#
# - **All tokens are known**: training, scoring, perplexity. One call over the whole text does the same work in one go:

# %%
known = jnp.asarray([text])
logits, cache = kvjax.forward(lm.model, known), kvjax.init_cache(lm.model, capacity=len(text))
kvjax.step(lm.model, cache, known[:, 0])  # both are compiled now
began = time.perf_counter()
jax.block_until_ready(kvjax.forward(lm.model, known))
at_once = time.perf_counter() - began
for token in text:
    logits, cache = kvjax.step(lm.model, cache, [token])
jax.block_until_ready(logits)
one_by_one = time.perf_counter() - began - at_once
print(
    f"{len(text)} known tokens: {1e3 * at_once:.1f} ms at once, {1e3 * one_by_one:.1f} ms through a cache, one by one"
)

# %% [markdown]
# - **One token is wanted** (a label, a choice): nothing is read twice.
# - **Tokens see each other both ways** (encoders): a prefix changes with what follows, as the strip above shows. Its
#   *output*, though, is fixed once the source is, and a decoder keeps that.
# - **The beginning changes** (a clock at the top of a prompt): all behind it has to be computed again.
# - **Memory is what is short**: more rows without a cache, or a smaller kind of cache, may write more tokens a second.

# %%
print(
    f"at t = {t}, one wanted token: {costs.without_cache_flops(TEXTBOOK, 1) / costs.with_kv_flops(TEXTBOOK, 1):g} times the work without a cache"
)
for position in (0, 50, 90):
    print(f"an edit at {position} of {t} tokens: {costs.edit_share(position, t):.0%} of the linear work of a prefill")
