"""What turning stored keys to new positions costs: errors after many shifts by one, of every store, and a plot.

    python scripts/drift.py                          # the table
    python scripts/drift.py --plot docs/drift.svg    # pip install 'kvjax[plots]'

A rotary key that moves is turned. Turned at every shift, it is rounded at every shift; turned once from where it was
stored, once; kept as it was projected, never again. All three go through the cache's own stores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402  (the path is set above)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from kvjax import caches  # noqa: E402
from kvjax.caches.contract import LayerShape  # noqa: E402
from kvjax.ops.positions import Rope  # noqa: E402

STORES = ("float32", "float16", "bfloat16", "int8()", "fp8()", "int4()")
SHIFTS, KEYS, WIDTH = 1000, 256, 64
ROPE = Rope()


def keys_of(plan: str, keys: np.ndarray) -> Any:
    """A layer's node that keeps `keys[1, n, 1, D]`."""
    shape = LayerShape(1, keys.shape[3], keys.shape[3], jnp.float32)
    node = caches.parse(plan).init(shape, 1, keys.shape[1])
    places = jnp.arange(keys.shape[1], dtype=jnp.int32)[None, :]
    return node.replace(k=node.k.write(jnp.asarray(keys), places, places))


def turned(node: Any, by: Any) -> Any:
    """All keys of a node, `by` positions on."""
    places = jnp.arange(node.capacity, dtype=jnp.int32)[None, :]
    return node.turn(places, lambda x: ROPE.turn(x, jnp.full(places.shape, by, jnp.int32)), {})


@jax.jit
def repeated(node: Any) -> Any:
    """`[SHIFTS, n, D]`, the keys after each shift by one."""

    def one(node: Any, _: None) -> tuple[Any, Any]:
        node = turned(node, -1)
        return node, node.k.unpacked()[0, 0].astype(jnp.float32)

    return jax.lax.scan(one, node, None, length=SHIFTS)[1]


@jax.jit
def once(node: Any) -> Any:
    """The same, each turned from the keys as they were stored."""
    by = -1 - jnp.arange(SHIFTS, dtype=jnp.int32)
    return jax.lax.map(lambda by: turned(node, by).k.unpacked()[0, 0].astype(jnp.float32), by)


def exact(keys: np.ndarray) -> np.ndarray:
    """`[SHIFTS, n, D]` in float64: what `keys[1, n, 1, D]` are when turned back 1, 2, … positions."""
    half = keys.shape[3] // 2
    angles = -np.arange(1, SHIFTS + 1)[:, None] * ROPE.theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    low, high = np.split(keys[0, None, :, 0].astype(np.float64), 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def errors(store: str, keys: np.ndarray) -> dict[str, np.ndarray]:
    """`[SHIFTS]` each: the norm of the error over the norm of the keys, after 1, 2, … shifts."""
    truth = exact(keys)
    kept, bare = keys_of(f"dense(store={store})", keys), keys_of(f"dense(store={store}, rotated=False)", keys)
    un_turned = np.asarray(turned(bare, -1).k.unpacked()[0, 0], np.float64)  # what is projected has no position
    found = {
        "repeated": np.asarray(repeated(kept), np.float64) - truth,
        "once": np.asarray(once(kept), np.float64) - truth,
        "un-rotated": np.broadcast_to(un_turned - keys[0, :, 0].astype(np.float64), truth.shape),
    }
    size = np.linalg.norm(truth, axis=(1, 2))
    return {name: np.linalg.norm(x, axis=(1, 2)) / size for name, x in found.items()}


def measured() -> dict[str, dict[str, np.ndarray]]:
    """`errors` of every store, on the same random keys."""
    keys = np.random.default_rng(0).normal(size=(1, KEYS, 1, WIDTH)).astype(np.float32)
    return {store: errors(store, keys) for store in STORES}


AT = (1, 10, 100, SHIFTS)


def table(found: dict[str, dict[str, np.ndarray]]) -> str:
    """The figures in Markdown."""
    heads = [f"{n:,} shift{'s' * (n > 1)}" for n in AT]
    lines = ["| store | " + " | ".join(heads) + f" | turned once by {SHIFTS:,} | kept un-turned |"]
    lines.append("|---|" + "---:|" * (len(AT) + 2))
    for store, by in found.items():
        cells = [by["repeated"][n - 1] for n in AT] + [by["once"][-1], by["un-rotated"][-1]]
        lines.append(f"| `{store}` | " + " | ".join(f"{x:.1e}" if x else "0" for x in cells) + " |")
    return "\n".join(lines)


def plot(found: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Draws the errors by the number of shifts; the same figures make the same file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "kvjax", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    at = np.unique(np.geomspace(1, SHIFTS, 60).astype(int))
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for number, (store, by) in enumerate(found.items()):
        colour = f"C{number}"
        axes.loglog(at, by["repeated"][at - 1], color=colour, label=store.removesuffix("()"))
        axes.loglog(at, by["once"][at - 1], color=colour, linestyle="--", linewidth=1)
        if by["un-rotated"][-1]:
            axes.loglog(at, by["un-rotated"][at - 1], color=colour, linestyle=":", linewidth=1)
    for style, label in (("-", "turned at every shift"), ("--", "turned once"), (":", "kept un-turned")):
        axes.plot([], [], color="grey", linestyle=style, label=label)
    axes.set_ylim(1e-8, 1e3)  # beyond 1 there is nothing left of a key; the table says how far it goes
    axes.set_xlabel("shifts by one position")
    axes.set_ylabel("relative error of the keys")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Errors of stored keys that are turned.",
        epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="an SVG of it")
    args = parser.parse_args(argv)
    found = measured()
    if args.plot:
        plot(found, args.plot)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
