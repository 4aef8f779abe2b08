"""What `kvjax.resume` costs by layer: seconds, against running the text again, with the cache as a value and donated.

python benchmarks/resuming.py
python benchmarks/resuming.py --layers 12 --width 768 --tokens 256 --no-save
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import harness
import jax
import numpy as np

import kvjax
from kvjax import caches
from kvjax.config import Config


def seconds(run: Callable[[Any], Any], make: Callable[[], Any], rounds: int) -> float:
    """The middle of some rounds; `make` gives what each uses."""
    took = []
    for _ in range(rounds + 1):  # the first compiles
        given = jax.block_until_ready(make())
        began = time.perf_counter()
        jax.block_until_ready(run(given))
        took.append(time.perf_counter() - began)
    return harness.median(took[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 6), ("width", 288), ("tokens", 256), ("back", 16), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--no-save", action="store_true", help="print only")
    a = parser.parse_args()
    config = Config(32_000, a.layers, a.width, a.width // 48, a.width // 48, 48, 8 * a.width // 3)
    model = kvjax.decoder(config, kvjax.init_params(config, jax.random.key(0)))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, a.tokens)).astype(np.int32)
    empty = kvjax.init_cache(model, caches.hybrid(), capacity=a.tokens)
    _, cache = kvjax.prefill(model, empty, ids)
    copy = lambda: jax.tree.map(lambda x: x + 0, cache)  # noqa: E731
    near, places = a.tokens - a.back, {}
    for what, at in ((f"the last {a.back} positions", near), (f"all {a.tokens} positions", 0)):
        for layer in sorted({0, a.layers // 2, a.layers - 1}):
            value = seconds(lambda c, i=layer, p=at: kvjax.resume(model, c, i, p), copy, a.rounds)
            used = seconds(lambda c, i=layer, p=at: kvjax.donating.resume(model, c, i, p), copy, a.rounds)
            places[f"{what}, from layer {layer}"] = {"value": value, "donated": used}
    again = seconds(lambda c: kvjax.prefill(model, c, ids), lambda: empty, a.rounds)
    copied = seconds(lambda c: jax.tree.map(lambda x: x + 0, c), copy, a.rounds)
    print(f"{'':44}{'value':>10}{'donated':>10}   milliseconds")
    for name, row in places.items():
        print(f"{name:44}{1e3 * row['value']:10.2f}{1e3 * row['donated']:10.2f}")
    print(f"{'prefill of the whole text':44}{1e3 * again:10.2f}\n{'copying the cache':44}{1e3 * copied:10.2f}")
    result = {"facts": harness.facts(), "arguments": vars(a), "cache_bytes": cache.nbytes, "resume": places}
    if not a.no_save:
        print(harness.save("resuming", result | {"prefill": again, "copy": copied}))


if __name__ == "__main__":
    main()
