# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kvjax/kvjax/blob/main/notebooks/1_quickstart.ipynb)
#
# # Quickstart
#
# A Transformer that writes text keeps the *keys and values* of what it has read: the KV cache. In kvjax that cache is
# a **value**: a function takes one and returns a new one, and nothing is changed in place. This notebook writes some
# text, swaps the cache for others, follows the shapes through one decoding step, goes back in time, and forks.

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
import importlib.util
import statistics
import time
import urllib.request

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display

import kvjax
from kvjax import caches, codecs, donating, sampling

plt.style.use(["tableau-colorblind10", {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False}])
jax.config.update("jax_default_matmul_precision", "highest")  # GPUs and TPUs, too, multiply float32 as float32
GREY, INK = "#b8b8b8", "#333333"


def table(head, *rows):
    """Shows a table; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    display(Markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)))


# %% [markdown]
# ## Load and generate
#
# `shakespeare` is a small Llama that comes with the package, so nothing is downloaded. (Without `dtype` a GPU would get
# what suits it.) Rows of a batch may have prompts of different lengths, and each draws from its own random key: a row
# says the same alone and in company.

# %%
lm = kvjax.load("shakespeare", dtype=jnp.float32)
prompts = ["ROMEO:", "JULIET, my"]
sampler = sampling.chain(sampling.temperature(0.8), sampling.top_p(0.95))
out = kvjax.generate(lm, prompts, max_new_tokens=60, seed=0, sampler=sampler)
for prompt, text in zip(prompts, out.text, strict=True):
    print(prompt + text, end="\n" + "-" * 40 + "\n")

# %% [markdown]
# The result has the cache in it, so it can go on. `out` stays as it was: going on made a new value.

# %%
more = kvjax.generate(lm, after=out, max_new_tokens=20)
whole = kvjax.generate(lm, prompts, max_new_tokens=80, seed=0, sampler=sampler)
print(more.text[0])
print("60 + 20 tokens are the same as 80:", bool((jnp.hstack([out.tokens, more.tokens]) == whole.tokens).all()))

# %% [markdown]
# ## Swap the cache
#
# What is kept is one argument, `plan`. A *plan* is a layout (where a position is kept) times what one stored number is.
# `recompute()` keeps nothing but the tokens and runs the whole text again for each new one: it is the reference.
#
# Below, every plan decodes greedily after the same prompt. `cache.nbytes` counts the arrays; time is the median of some
# rounds on whatever machine runs this, in a cache with room for all positions that the model knows.

# %%
model = lm.model
ROOM, NEW = model.max_positions, 64
PLANS = {
    "recompute()": caches.recompute(),
    "dense()": caches.dense(),
    "dense(store=float16)": caches.dense(store=jnp.float16),
    "dense(store=int8())": caches.dense(store=codecs.int8()),
    "dense(store=int4())": caches.dense(store=codecs.int4()),
    "ring(64, sinks=4)": caches.ring(64, sinks=4),
}
prompt = lm.encode(out.text[0])[:96]


def run(plan, rounds=5):
    """Greedy tokens, the bytes of the cache, seconds a token."""
    empty = kvjax.init_cache(model, plan, capacity=ROOM)
    logits, cache = kvjax.prefill(model, empty, [prompt])
    seconds = []
    for round in range(rounds + 1):  # the first one compiles
        mine = jax.tree.map(jnp.copy, cache)  # `donating` uses up what it is given: no copy while the clock runs
        jax.block_until_ready(mine)
        began = time.perf_counter()
        tokens, _, _ = jax.block_until_ready(donating.decode(model, mine, logits, steps=NEW))
        seconds.append((time.perf_counter() - began) / NEW)
    return tokens[0].tolist(), cache.nbytes, statistics.median(seconds[1:])


found = {name: run(plan) for name, plan in PLANS.items()}
reference = found["recompute()"][0]
rows = []
for name, (tokens, nbytes, seconds) in found.items():
    same = next((i for i, (x, y) in enumerate(zip(tokens, reference, strict=True)) if x != y), NEW)
    rows.append((f"`{name}`", f"{nbytes:,}", f"{1e3 * seconds:.2f}", f"{1 / seconds:,.0f}", f"{same} of {NEW}"))
table(("plan", "bytes", "ms a token", "tokens a second", "tokens as without a cache"), *rows)

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8.6, 2.9), sharey=True, constrained_layout=True)
names = list(found)[::-1]
colours = ["C0" if name == "dense()" else GREY for name in names]
kilobytes, milliseconds = ([found[name][i] * scale for name in names] for i, scale in ((1, 1e-3), (2, 1e3)))
bars = left.barh(names, kilobytes, color=colours, height=0.62)
left.bar_label(bars, [f"{value:,.0f}" for value in kilobytes], padding=4, fontsize=9, color=INK)
left.set_xlabel("cache, kB")
left.margins(x=0.18)
left.tick_params(axis="y", length=0)
left.set_yticks(range(len(names)), names, family="monospace", fontsize=9)
right.grid(axis="x", color="#e5e5e5")
right.set_axisbelow(True)
right.scatter(milliseconds, range(len(names)), color=colours, s=70)
for at, value in enumerate(milliseconds):
    right.annotate(f"{value:.2f}", (value, at), (8, 0), textcoords="offset points", va="center", fontsize=9, color=INK)
right.set_xscale("log")
right.set_xlim(min(milliseconds) * 0.6, max(milliseconds) * 2.5)
right.set_xlabel("milliseconds a token (log)")
right.tick_params(axis="y", length=0)
plt.show()

# %% [markdown]
# `dense()` and `recompute()` give the same tokens: a cache is no approximation. A narrower store or a ring that forgets
# old positions is one, and its text may part from the reference sooner or later.

# %% [markdown]
# ## What happens inside: the shapes
#
# Decoding has two stages. **Prefill** feeds the prompt, many tokens at once; **a step** feeds one token a row. It is one
# function: only S differs.
#
# | letter | means |
# |---|---|
# | B | rows of the batch |
# | S | new tokens in this call |
# | T | slots of the cache |
# | K | key-value heads |
# | G | query heads that share one key-value head, so there are K · G query heads |
# | D | width of a head |
# | M | width of the stream between layers |
#
# Here is one attention layer written out, with the model's own weights, and a plain pair of arrays as its cache. Read it
# top to bottom: `note` writes down each shape.


# %%
def attention_layer(params, x, keys, values, lengths, note):
    """Norm, projections, cache, scores, mask, softmax, values. Returns the new stream and the new cache."""
    c = model.config
    b, s, m = x.shape
    k, g, d = c.kv_heads, c.query_heads // c.kv_heads, c.head_dim
    positions = note("positions of the new tokens", "B S", lengths[:, None] + jnp.arange(s)[None, :])

    h = note("stream, normed", "B S M", c.norm(params["attn_norm"], x))
    q, new_k, new_v = jnp.split(h @ params["attn"]["qkv"]["kernel"], [k * g * d, (k * g + k) * d], axis=-1)
    turns = c.positions.tables(positions, d, x.dtype)  # RoPE: queries and keys are turned to where they stand
    q = note("queries", "B S K·G D", c.positions.rotate(q.reshape(b, s, k * g, d), turns))
    new_k = note("new keys", "B S K D", c.positions.rotate(new_k.reshape(b, s, k, d), turns))
    new_v = note("new values", "B S K D", new_v.reshape(b, s, k, d))

    put = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice(old, new, (0, at, 0)))
    keys = note("cached keys", "B K T D", put(keys, new_k.swapaxes(1, 2), lengths))
    values = note("cached values", "B K T D", put(values, new_v.swapaxes(1, 2), lengths))

    scores = jnp.einsum("bskgd,bktd->bkgst", q.reshape(b, s, k, g, d), keys) * d**-0.5
    seen = positions[:, None, None, :, None] >= jnp.arange(keys.shape[2])[None, None, None, None, :]
    scores = note("scores, masked", "B K G S T", jnp.where(seen, scores, -jnp.inf))
    weights = note("weights", "B K G S T", jax.nn.softmax(scores, axis=-1))
    read = note("what was read", "B S K G D", jnp.einsum("bkgst,bktd->bskgd", weights, values))
    x = note("stream, after attention", "B S M", x + read.reshape(b, s, k * g * d) @ params["attn"]["out"]["kernel"])
    return x, keys, values


def walk(ids, keys, values, lengths):
    """The first layer over new tokens; shapes by stage."""
    shapes = {}

    def note(stage, axes, value):
        shapes[stage] = (axes, value.shape)
        return value

    x = note("embedding", "B S M", model.params["embed"]["table"][jnp.asarray(ids)])
    x, keys, values = attention_layer(model.params["layers"]["0"], x, keys, values, lengths, note)
    return x, keys, values, shapes


text = np.asarray([lm.encode("To be, or not to be")[:7], lm.encode("What light through yonder")[:7]])
empty = jnp.zeros((2, model.config.kv_heads, 16, model.config.head_dim))
x_prefill, keys, values, prefill_shapes = walk(text[:, :6], empty, empty, jnp.array([0, 0]))
x_step, keys, values, step_shapes = walk(text[:, 6:], keys, values, jnp.array([6, 6]))


def dimensions(shape):
    return " × ".join(map(str, shape))


table(
    ("stage", "axes", "prefill, S = 6", "a step, S = 1"),
    *(
        (stage, axes.replace(" ", " × "), dimensions(shape), dimensions(step_shapes[stage][1]))
        for stage, (axes, shape) in prefill_shapes.items()
    ),
)

# %% [markdown]
# In the step everything has one token, but the scores still reach over all T slots: that is where the cache is read.
# The library does the same, in every layer, and its trace of the stream shows that the walk above is right:

# %%
cache = kvjax.init_cache(model, caches.hybrid(), batch=2, capacity=16)  # keys, values, and the stream beside them
before = cache
_, prefilled = kvjax.prefill(model, before, text[:, :6])
_, stepped = kvjax.step(model, prefilled, text[:, 6])

stream = stepped.trace(0, "after_self_attention")
np.testing.assert_allclose(stream[:, :6], x_prefill, atol=1e-5)
np.testing.assert_allclose(stream[:, 6:7], x_step, atol=1e-5)
np.testing.assert_allclose(stepped.keys(0)[:, :, :7], keys[:, :, :7], atol=1e-5)


def places(cache):
    """Where the slots of the first row stand in the text; a dot for an empty one."""
    return " ".join("·" if place == 2**31 - 1 else str(place) for place in cache.positions(0)[0].tolist())


moments = {"before": before, "after prefill": prefilled, "after a step": stepped}
for name, each in moments.items():
    print(f"{name:14} lengths {each.lengths.tolist()}  positions of slots: {places(each)}")

# %% [markdown]
# Three caches, and all three still exist: a step does not change the cache that it was given. Here are the keys of the
# first layer and head, a column per slot:

# %%
fig, panels = plt.subplots(1, 3, figsize=(8.6, 2.5), sharey=True, constrained_layout=True)
for axes, (title, each) in zip(panels, moments.items(), strict=True):
    shown = np.array(each.keys(0)[0, 0]).T
    shown[:, np.asarray(each.positions(0)[0]) == 2**31 - 1] = np.nan  # an empty slot holds nothing
    image = axes.imshow(shown, cmap="RdBu_r", vmin=-6, vmax=6, aspect="auto", interpolation="none")
    axes.set(facecolor="#eeeeee", xlabel="slot (T)", xticks=range(0, 16, 3))
    axes.set_title(title, fontsize=10)
panels[0].set_ylabel("head width (D)")
arrow = {"arrowstyle": "->", "color": INK}
panels[2].annotate("new", (6.6, 15.5), (9.5, 15.5), va="center", fontsize=9, color=INK, arrowprops=arrow)
fig.colorbar(image, ax=panels, label="key", shrink=0.9)
plt.show()

# %% [markdown]
# ## Rewind
#
# A cache goes back to any absolute length, a row each. What was fed after that leaves no trace: feeding other tokens
# gives, to the bit, what it would have given had the dropped ones never been there.

# %%
logits, cache = kvjax.prefill(model, kvjax.init_cache(model, capacity=64), [prompt[:20]])
_, once = kvjax.step(model, cache, [5])
_, ahead = kvjax.decode(model, cache, logits, steps=8)[1:]
back = ahead.rewind(cache.lengths)
want, got = kvjax.step(model, cache, [7])[0], kvjax.step(model, back, [7])[0]
print("lengths:", cache.lengths.tolist(), "->", ahead.lengths.tolist(), "->", back.lengths.tolist())
print("bitwise the same logits:", bool((want == got).all()))

# %% [markdown]
# ## Fork
#
# Two names for one value are a fork. Below, one trunk is generated once, and two branches go on from it; neither knows
# of the other, and the trunk can be used again. `logprobs=0` asks for the log-probability of each chosen token.

# %%
trunk = kvjax.generate(lm, "ROMEO:\nO, she doth teach", max_new_tokens=12)
print("ROMEO:\nO, she doth teach" + trunk.text[0])
for word in (" love", " hate"):
    branch = kvjax.generate(lm, [word], after=trunk, max_new_tokens=24, logprobs=0)
    told = branch.text[0].replace("\n", "\n    ")
    print(f"\n --{word} ({float(branch.logprobs.chosen.mean()):.2f} nats a token)\n    {told}")

# %% [markdown]
# ## A real checkpoint
#
# `kvjax.load` reads Llama, Mistral, Qwen, Gemma, GPT-2, T5, BART and Marian checkpoints in Hugging Face's layout, from
# a folder or by their name on the hub. This cell downloads one, if the hub answers and `huggingface_hub` is installed
# (`kvjax[hub]`); else it says so, and nothing is lost.

# %%
NAME = "HuggingFaceTB/SmolLM2-135M"


def why_not():
    """What stands in the way, in words; None if nothing does."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return "huggingface_hub is not installed"
    try:
        urllib.request.urlopen(f"https://huggingface.co/{NAME}/resolve/main/config.json", timeout=3).close()
    except OSError:
        return "the hub does not answer"


if reason := why_not():
    print(f"{NAME} is left out: {reason}.")
else:
    large = kvjax.load(NAME)
    said = kvjax.generate(large, "The cache of a Transformer is", max_new_tokens=40)
    print("The cache of a Transformer is" + said.text[0])
    for plan in (caches.dense(), caches.dense(store=codecs.int8())):
        print(f"{kvjax.cache_nbytes(large.model, plan, capacity=2048):>12,} bytes for 2,048 positions: {plan}")

# %% [markdown]
# ## Next
#
# 2. *What can we cache?* Why keys and values, and not queries or scores; and what each choice costs.
# 3. *A zoo of caches*: memory against quality, pages, and a kind of your own.
# 4. *Draft, rewind, edit, translate*: what one can do with a cache that is a value.
