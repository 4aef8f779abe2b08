"""What approximate caches cost in quality: a table of copy accuracy, KL against dense, loss of a text, and bytes.

    python scripts/quality.py --text tinyshakespeare.txt --write     # the whole table: docs/quality.md and its JSON
    python scripts/quality.py --text tinyshakespeare.txt --plan 'ring(32)' --plan 'dense(store=bfloat16)'
    python scripts/quality.py --text tinyshakespeare.txt --chars 5000 --json
    python scripts/quality.py --text tinyshakespeare.txt --weights --write   # only the table of int8 weights, again
    python scripts/quality.py --check                    # only whether the page is that of its JSON; needs no text

The text is that of the bundled model `shakespeare`; only its last 111,540 characters are read, which nothing was
trained on. Every figure is taken once with the models as they are and once with an outlier planted in the keys of every
layer, which changes no function (`kvjax.testing.induction.plant_outlier`).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts"), str(ROOT)]

import harness  # noqa: E402  (the path is set above)
import pages  # noqa: E402

import kvjax  # noqa: E402
from kvjax import caches  # noqa: E402
from kvjax.testing import induction  # noqa: E402

PLANS = (
    "dense()",
    "dense(rotated=False)",
    "dense(store=bfloat16)",
    "dense(store=float16)",
    "dense(store=int8())",
    "dense(store=int8(scale=bfloat16))",
    "dense(store=int8(), rotated=False)",
    "dense(store=fp8())",
    "dense(store=int4())",
    "dense(store=int4(), rotated=False)",
    "dense(store=int4_channels(32, residual=32))",
    "layer_input(store=bfloat16)",
    "layer_input(store=int8())",
    "ring(64)",
    "ring(64, sinks=4)",
    "ring(64, sinks=4, sinks_in_cache=True)",
    "ring(32)",
    "ring(32, store=int8())",
)
"""As text, `caches.parse` reads them. The first is what the others are measured against."""

ROWS, LENGTH = 16, 256
FACTOR, PAIR = 20.0, 1
TEST_CHARS = 111_540
DOCUMENT = ROOT / "docs" / "quality.md"


def planted(model: kvjax.Model) -> kvjax.Model:
    """An outlier in the keys of every layer."""
    for layer in range(model.config.num_layers):
        model = induction.plant_outlier(model, layer, PAIR, FACTOR)
    return model


def measured(text: str, plans: tuple[str, ...], quiet: bool) -> list[dict[str, Any]]:
    """One row a plan."""
    copying, lm = induction.induction_model(), kvjax.load("shakespeare")
    tokens, _ = induction.copy_task(induction.EVALUATION_SEED, ROWS, LENGTH)
    variants = {
        "": (copying, lm),
        "_outlier": (planted(copying), dataclasses.replace(lm, model=planted(lm.model))),
    }
    rows = []
    with tqdm(total=len(plans) * len(variants) * 3, unit="figure", disable=quiet, file=sys.stderr) as bar:
        for name in plans:
            plan = caches.parse(name)
            size = kvjax.cache_nbytes(lm.model, plan, batch=1, capacity=LENGTH)
            row: dict[str, Any] = {"plan": name, "bytes_per_token": size / LENGTH}
            for suffix, (model, words) in variants.items():
                bar.set_postfix_str(name, refresh=False)
                row["copy_accuracy" + suffix] = induction.copy_accuracy(model, plan, rows=ROWS, length=LENGTH)
                bar.update()
                row["kl" + suffix] = induction.divergence(model, plan, tokens)
                bar.update()
                row["nats_per_char" + suffix] = induction.nats_per_char(words, plan, text)
                bar.update()
            rows.append(row)
    return rows


def measured_weights(text: str) -> dict[str, Any]:
    """Both bundled models with their weights as they are, and in int8."""
    copying, lm = induction.induction_model(), kvjax.load("shakespeare")
    tokens, _ = induction.copy_task(induction.EVALUATION_SEED, ROWS, LENGTH)
    words = np.asarray(lm.encode(text)[: ROWS * LENGTH], np.int32).reshape(ROWS, LENGTH)
    rows = []
    for name, change in (("float32", lambda model: model), ("int8", kvjax.int8_weights)):
        models = {"copying": (copying, change(copying), tokens), "shakespeare": (lm.model, change(lm.model), words)}
        row: dict[str, Any] = {"weights": name}
        row["bytes"] = sum(x.nbytes for x in jax.tree.leaves(models["shakespeare"][1].params))
        row["copy_accuracy"] = induction.copy_accuracy(models["copying"][1], caches.dense(), rows=ROWS, length=LENGTH)
        row["kl"] = {key: between(*of) for key, of in models.items()}
        own = dataclasses.replace(lm, model=models["shakespeare"][1])
        row["nats_per_char"] = induction.nats_per_char(own, caches.dense(), text)
        rows.append(row)
    facts = harness.facts()
    return {"day": facts["day"], "jax": facts["jax"], "rows": rows}


def between(model: kvjax.Model, other: kvjax.Model, tokens: Any) -> float:
    """Mean KL(model ‖ other) over the next-token distributions of `tokens[B, S]`, in nats."""
    p, q = (np.asarray(jax.nn.log_softmax(kvjax.forward(m, tokens)), np.float64) for m in (model, other))
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def weights_table(rows: list[dict[str, Any]]) -> str:
    """The figures in Markdown."""
    lines = [
        "| weights | bytes | nats per character | KL, nats | copied right | KL of copying, nats |",
        "|---|" + "---:|" * 5,
    ]
    for row in rows:
        kl = {key: f"{max(value, 0.0):.1e}" for key, value in row["kl"].items()}
        cells = [row["weights"], f"{row['bytes']:,}", f"{row['nats_per_char']:.4f}", kl["shakespeare"]]
        cells += [f"{100 * row['copy_accuracy']:.2f} %", kl["copying"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """The figures in Markdown."""
    head = (
        "| plan | bytes per token | copied right | KL, nats | nats per character "
        "| copied right, outlier | KL, outlier | nats per character, outlier |"
    )
    lines = [head, "|---|" + "---:|" * 7]
    for row in rows:
        cells = [f"`{row['plan']}`", f"{row['bytes_per_token']:,.0f}"]
        for suffix in ("", "_outlier"):
            accuracy, kl, nats = (row[key + suffix] for key in ("copy_accuracy", "kl", "nats_per_char"))
            cells += [f"{100 * accuracy:.2f} %", f"{max(kl, 0.0):.1e}", f"{nats:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def document(result: dict[str, Any]) -> str:
    """What `docs/quality.md` says."""
    facts = result["facts"]
    versions = ", ".join(f"{name} {facts[name]}" for name in ("kvjax", "jax", "jaxlib", "flax", "numpy", "python"))
    return f"""# What an approximate cache costs in quality

How much worse a model copies and reads when its cache or its weights keep less than was computed.

`python scripts/quality.py --text tinyshakespeare.txt --write` made this file, on {facts["day"]}, on
{facts["processor"]} ({facts["system"]}), with {versions}.

Copying is a hard test of a cache: the bundled model `induction` reads random blocks of 16 to 48 different tokens,
repeated ({ROWS} texts of {LENGTH} tokens), and a token counts as copied right if it has the largest logit. KL is the
mean of KL(dense ‖ plan) over the next-token distributions of the same texts. Nats per character are of the bundled
model `shakespeare` on {result["chars"]:,} characters of its text that nothing was trained on. In every text the first
part is prefilled and each later token is fed in a call of its own, so that what a prediction rests on was read from the
cache. Bytes are those of the `shakespeare` model's cache at {LENGTH} tokens, over {LENGTH}.

*Outlier*: in every layer one rotary pair of the keys is {FACTOR:g} times as large, and of the queries as much smaller.
The function is the same; codes that share a scale among the channels of a key lose the others.

{table(result["rows"])}

## Weights in int8

`python scripts/quality.py --text tinyshakespeare.txt --weights --write` made this table, on
{result["weights"]["day"]}, with jax {result["weights"]["jax"]}: the same models and characters with
`kvjax.int8_weights`, one scale for each output, and a dense cache. KL is the mean of KL(float32 ‖ int8), of
`shakespeare` over the first {ROWS * LENGTH:,} tokens of those characters. Bytes are those of its weights.

{weights_table(result["weights"]["rows"])}
"""


def written(result: dict[str, Any]) -> None:
    """The page and its figures."""
    DOCUMENT.write_text(document(result), "utf-8")
    harness.save(f"quality-{result['facts']['jax']}", result)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="What approximate caches cost in quality.",
        epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", type=Path, help="the text that `shakespeare` was trained on")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not that of its JSON")
    parser.add_argument("--plan", action="append", metavar="KIND", help="only these, as in Python; may be repeated")
    parser.add_argument("--weights", action="store_true", help="only int8 weights; --write keeps the rest of the page")
    parser.add_argument("--chars", type=int, default=30_000, help="of the text's end to score (default 30,000)")
    parser.add_argument("--write", action="store_true", help="write docs/quality.md and benchmarks/results")
    parser.add_argument("--json", action="store_true", help="JSON on standard output instead of a table")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if args.plan and (args.write or args.weights):
        parser.error("--write writes the whole table, --weights has no plans; leave out --plan")
    if args.check:
        found = [json.loads(path.read_text("utf-8")) for path in sorted(harness.RESULTS.glob("*/quality-*.json"))]
        made = document(found[-1]).splitlines()
        return pages.check(DOCUMENT, made, "python scripts/quality.py --text tinyshakespeare.txt --write")
    if args.text is None:
        parser.error("--text says where the text is that everything is measured on")
    raw = args.text.read_bytes()
    text = raw.decode("utf-8")[-TEST_CHARS:][: args.chars]
    if args.weights:
        made = measured_weights(text)
        if args.write:
            path = harness.RESULTS / harness.device_name() / f"quality-{made['jax']}.json"
            written(json.loads(path.read_text("utf-8")) | {"weights": made})
        print(json.dumps(made, indent=2) if args.json else weights_table(made["rows"]))
        return 0
    result: dict[str, Any] = {
        "facts": harness.facts(),
        "text_sha256": hashlib.sha256(raw).hexdigest(),
        "chars": len(text),
        "texts": [ROWS, LENGTH],
        "outlier": {"factor": FACTOR, "pair": PAIR},
        "rows": measured(text, tuple(args.plan or PLANS), args.quiet),
    }
    if args.write:
        written(result | {"weights": measured_weights(text)})
    print(json.dumps(result, indent=2) if args.json else table(result["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
