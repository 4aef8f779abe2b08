"""kvjax beside llama.cpp, CTranslate2 and Transformers on PyTorch: the same weights and prompts, float32, all cores.

Greedy, and the tokens of all are compared; where rows differ, how far the two choices are apart, of the largest logit
(for beams, of the log-probability): the widest of them in the table, all in the JSON. Rounds alternate between all of
them in one run, and ratios are taken within a round. Every one runs at its defaults, the same for every size.
llama.cpp's defaults have a float16 cache and an attention that rounds to float16, which changes tokens: it runs with
these, and with a float32 cache and its plain attention.

decode    prompts of 16 tokens and what follows: `kvjax generate` against the others' `generate`. `kvjax decode` is the
          bare prefill and scan. Times have the prompt in them.
prefill   one prompt, to the logits after its last token, and a cache
seq2seq   6 + 6 layers, 32 source tokens and 32 new ones, greedy and 4 beams, against CTranslate2

`peers_environments.py` makes what the others need, first. A part and a shape take 2 to 5 minutes, a third of it
compilation by PyTorch; each has its own file, so that it can be run again alone.

python benchmarks/peers.py
python benchmarks/peers.py --parts decode --shapes 110M --batches 1
python benchmarks/peers.py --parts prefill --shapes 15M --only kvjax llama.cpp
python benchmarks/peers.py --quick
python benchmarks/peers.py --table benchmarks/results/cpu/peers-decode-15M.json --plot peers.svg
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import jax
import numpy as np
import peers_environments
import peers_models
from peers_worker import Worker, timed

import kvjax

SCRIPTS = {"llama": "peers_llama.py", "ctranslate": "peers_ctranslate.py", "torch": "peers_torch.py"}
"""Environment to worker."""

LLAMA = {f"llama.cpp {way}": ("llama", {"way": way}) for way in ("float32", "default")}
CTRANSLATE: dict[str, tuple[str, dict[str, str]]] = {"CTranslate2": ("ctranslate", {})}
TORCH = {f"PyTorch {way}": ("torch", {"way": way}) for way in ("dynamic", "static", "compiled")}
OWN = {f"kvjax {way}": ("kvjax", {"way": way}) for way in ("generate", "decode")}
WAYS: dict[str, dict[str, tuple[str, dict[str, str]]]] = {
    "decode": {**OWN, **LLAMA, **CTRANSLATE, **TORCH},
    "prefill": {"kvjax": ("kvjax", {}), **LLAMA, **CTRANSLATE, "PyTorch": ("torch", {})},
    "seq2seq": {"kvjax": ("kvjax", {}), **CTRANSLATE},
}
"""Part to names, and who answers with which arguments; the first of each is kvjax as people use it."""

DO = {"decode": "generate", "prefill": "prefill", "seq2seq": "translate"}
PROMPT, SOURCE, REST = 16, 32, 0.2
"""Tokens; seconds before each measurement, in which threads of the one before go to sleep."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured at once: `rows` prompts of `length` tokens and `new` ones after them."""

    part: str
    shape: str
    rows: int
    length: int
    new: int
    beams: int = 1

    @property
    def name(self) -> str:
        """For people."""
        how = {"decode": f"{self.new} new", "prefill": f"{self.length} tokens"}
        return f"{self.shape}, batch {self.rows}, " + how.get(self.part, f"{self.beams} beams")

    @property
    def counted(self) -> int:
        """Tokens that a rate counts."""
        return self.rows * (self.length if self.part == "prefill" else self.new)


def cases(part: str, shape: str, a: argparse.Namespace) -> Iterator[Case]:
    """Of one file."""
    if part == "prefill":
        yield from (Case(part, shape, 1, length, 1) for length in a.lengths)
    elif part == "seq2seq":
        yield from (Case(part, shape, rows, SOURCE, a.new or 32, w) for rows in a.batches for w in (1, 4))
    else:
        for rows in a.batches:
            yield Case(part, shape, rows, PROMPT, a.new or (240 if shape == "15M" else 128 if rows == 1 else 64))


class Mine:
    """kvjax, with a worker's commands."""

    lm: kvjax.LM

    def ask(self, do: str, **arguments: Any) -> Any:
        """As `Worker.ask`."""
        return getattr(self, do)(**arguments)

    def load(self, folder: str, rows: int, longest: int, threads: int) -> None:
        """As people load it."""
        self.lm = kvjax.load(folder)

    def versions(self) -> dict[str, str]:
        """Those of the head."""
        return {}

    def generate(self, prompts: list[list[int]], new: int, way: str) -> dict[str, Any]:
        """Greedy."""
        run = peers_models.texts if way == "generate" else bare
        seconds, tokens = timed(lambda: run(self.lm, prompts, new))
        return {"seconds": seconds, "tokens": tokens}

    def prefill(self, prompts: list[list[int]]) -> dict[str, Any]:
        """The next token of each row, and a cache, which is made in the time."""
        model, length = self.lm.model, len(prompts[0])

        def run() -> Any:
            cache = kvjax.init_cache(model, batch=len(prompts), capacity=length)
            logits, cache = jax.block_until_ready(kvjax.donating.prefill(model, cache, np.asarray(prompts)))
            return np.asarray(logits).argmax(axis=1)

        seconds, tokens = timed(run)
        return {"seconds": seconds, "tokens": tokens[:, None].tolist()}

    def translate(self, prompts: list[list[int]], new: int, beams: int) -> dict[str, Any]:
        """Greedy, or the best text of a search."""
        options = {} if beams == 1 else {"algorithm": kvjax.beam(beams)}
        seconds, tokens = timed(lambda: peers_models.texts(self.lm, prompts, new, **options))
        return {"seconds": seconds, "tokens": tokens}


def bare(lm: kvjax.LM, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Prefill and one scan, in a cache with room for all."""
    cache = kvjax.init_cache(lm.model, batch=len(prompts), capacity=len(prompts[0]) + new)
    logits, cache = kvjax.donating.prefill(lm.model, cache, np.asarray(prompts))
    return np.asarray(kvjax.donating.decode(lm.model, cache, logits, steps=new)[0]).tolist()


def measured(case: Case, folder: Path, workers: dict[str, Any], names: list[str], count: int) -> dict[str, Any]:
    """All ways of a case, in alternating rounds; a way that fails is told and left out."""
    chosen = {name: way for name, way in WAYS[case.part].items() if name in names}
    for who in dict.fromkeys(who for who, _ in chosen.values()):
        longest = case.length + case.new
        workers[who].ask("load", folder=str(folder), rows=case.rows, longest=longest, threads=os.cpu_count())
    lm = workers["kvjax"].lm
    prompts = peers_models.prompts(lm, case.rows, case.length, 1 if case.part == "prefill" else case.new)
    given = {"decode": {"new": case.new}, "seq2seq": {"new": case.new, "beams": case.beams}}.get(case.part, {})
    said: dict[str, list[list[list[int]]]] = {name: [] for name in chosen}

    def way(name: str) -> Callable[[], float]:
        who, more = chosen[name]

        def run() -> float:
            time.sleep(REST)
            for _ in range(1 if case.part == "decode" else 3):  # after a rest, short calls wait for cores to wake up
                answer = workers[who].ask(DO[case.part], prompts=prompts, **given, **more)
            said[name].append(answer["tokens"])
            return float(answer["seconds"])

        return run

    runs, failed = {name: way(name) for name in chosen}, {}
    for name in list(runs):
        try:
            runs[name]()  # compiles
        except RuntimeError as error:
            failed[name] = str(error).strip().splitlines()[-1]
            print(f"{case.name}: {name} is left out: {error}", flush=True)
            del runs[name]
    seconds = harness.rounds(runs, count)
    first = next(iter(seconds))
    return {
        **dataclasses.asdict(case),
        "seconds": seconds,
        "rate": {name: harness.spread([case.counted / x for x in spent]) for name, spent in seconds.items()},
        "kvjax_is": {name: harness.over(spent, seconds[first]) for name, spent in seconds.items()},
        "tokens": {name: told(lm, case, prompts, said[first][0], said[name]) for name in seconds},
        "distinct": min(len(set(row)) for row in said[first][0]),
        "failed": failed,
    } | ({"step_bytes": step_bytes(lm, case)} if case.part == "decode" else {})


def told(lm: kvjax.LM, case: Case, prompts: Any, mine: Any, theirs: list[Any]) -> str:
    """Whether a way gave the tokens of kvjax, in every round."""
    if any(again != theirs[0] for again in theirs):
        return "differ between rounds"
    rows = zip(prompts, mine, theirs[0], strict=True)
    found = [x for row in rows if (x := peers_models.difference(lm, *row, beams=case.beams)) is not None]
    return f"{len(found)} of {case.rows} rows: {'; '.join(found)}" if found else "equal"


def step_bytes(lm: kvjax.LM, case: Case) -> float:
    """Bytes that a step must read, on average: the weights once, and the keys and values of each row."""
    config, leaves = lm.model.config, jax.tree.leaves(lm.model.params)
    kept = config.num_layers * 2 * config.kv_heads * config.head_dim * leaves[0].dtype.itemsize
    return sum(x.nbytes for x in leaves) + case.rows * kept * (case.length + case.new / 2)


def shown(result: dict[str, Any]) -> str:
    """The table."""
    lines = []
    for case in map(dict, result["cases"]):
        for name, rate in case["rate"].items():
            share = (
                rate["median"] / case["rows"] * case["step_bytes"] / result["ceilings"]["read"]
                if "step_bytes" in case
                else None
            )
            ratio = harness.cell(case["kvjax_is"][name])
            lines.append(
                (
                    case["name"],
                    name,
                    harness.cell(rate, ".0f"),
                    ratio,
                    f"{share:.2f}" if share else "",
                    peers_models.brief(case["tokens"][name]),
                )
            )
        lines += [(case["name"], name, "failed", "", "", why) for name, why in case["failed"].items()]
    head = ("case", "by", "tokens/s", "kvjax is × as fast", "of reading", "tokens")
    return harness.headline(result) + "\n\n" + harness.table(head, lines)


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Bars: the rate of each beside kvjax's."""
    axes = figure.subplots()
    names = list(dict.fromkeys(name for case in result["cases"] for name in case["rate"]))
    for i, name in enumerate(names):
        found = [(at, case["kvjax_is"][name]) for at, case in enumerate(result["cases"]) if name in case["rate"]]
        places = [at + (i - (len(names) - 1) / 2) * 0.8 / len(names) for at, _ in found]
        middle = [1 / ratio["median"] for _, ratio in found]
        ends = [[m - 1 / r["most"] for m, (_, r) in zip(middle, found, strict=True)]]
        ends += [[1 / r["least"] - m for m, (_, r) in zip(middle, found, strict=True)]]
        axes.bar(places, middle, 0.8 / len(names), yerr=ends, label=name)
    axes.set_xticks(range(len(result["cases"])), [case["name"] for case in result["cases"]])
    axes.set_ylabel("tokens a second, of kvjax's")
    axes.legend()


def main() -> None:
    """Measures, prints, writes a JSON for each part and shape."""
    parser = harness.options(__doc__)
    known = list(dict.fromkeys(name for ways in WAYS.values() for name in ways))
    parser.add_argument("--parts", nargs="+", choices=list(WAYS), default=list(WAYS), help="default all")
    parser.add_argument("--shapes", nargs="+", help="of decoders; default 15M 110M 135M, for prefill without the last")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="default 1 8")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[128, 512, 1024], help="of prefill; default 128 512 1024"
    )
    parser.add_argument(
        "--new", type=int, help="new tokens; default 240 at 15M, else 128, 64 in a batch, 32 of seq2seq"
    )
    parser.add_argument("--only", nargs="+", default=known, help=f"names, or how they begin: {', '.join(known)}")
    parser.add_argument("--environments", type=Path, default=peers_environments.FOLDER, help="folder of the peers")
    a = parser.parse_args()
    if harness.shown(a, shown, draw):
        return
    if a.quick:
        a.rounds, a.batches, a.lengths, a.new, a.shapes = 2, [2], [32], 16, ["tiny"]
    names = [name for name in known if name.startswith(("kvjax", *a.only))]
    needed = {who for part in a.parts for name, (who, _) in WAYS[part].items() if name in names} - {"kvjax"}
    pythons = {who: peers_environments.python_of(a.environments, who) for who in sorted(needed)}
    if missing := [who for who, python in pythons.items() if not python.exists()]:
        raise SystemExit(f"no environment for {', '.join(missing)}: python benchmarks/peers_environments.py")
    workers: dict[str, Any] = {"kvjax": Mine()} | {who: Worker(python, SCRIPTS[who]) for who, python in pythons.items()}
    try:
        for part in a.parts:
            shapes = (
                ["tiny seq2seq" if a.quick else "6+6"] if part == "seq2seq" else a.shapes or ["15M", "110M", "135M"]
            )
            for shape in shapes[:2] if part == "prefill" and not a.shapes else shapes:
                measure(part, shape, workers, names, a)
    finally:
        for who in pythons:
            workers[who].close()


def measure(part: str, shape: str, workers: dict[str, Any], names: list[str], a: argparse.Namespace) -> None:
    """One file."""
    result = {**harness.begin(a), "cases": []}
    folder = peers_models.write(a.environments / "models", shape)
    for case in cases(part, shape, a):
        result["cases"].append({"name": case.name} | measured(case, folder, workers, names, a.rounds))
        print(f"{case.name}: done", flush=True)
    result["versions"] = {who: workers[who].ask("versions") for who in workers}
    harness.done(f"peers-{part}-{shape}".replace("+", "-"), result, a, draw, shown(result))


if __name__ == "__main__":
    main()
