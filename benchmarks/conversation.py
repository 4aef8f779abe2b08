"""What `kvjax.Conversation` saves and costs: seconds before a reply begins, against feeding everything, and bytes kept.

    python benchmarks/conversation.py
    python benchmarks/conversation.py --layers 12 --width 768 --turns 12 --no-save

A random model and a letter a token. Its replies are often other tokens once they are messages, so that caches are
rewound, or earlier ones used, as with models whose replies are trimmed. The second time through is measured.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import harness
import jax
import tokenizers

import kvjax
from kvjax import caches, sampling
from kvjax.config import Config
from kvjax.templates import Template
from kvjax.text import Tokenizer

TEMPLATE = Template(
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content | trim }}</s>{% endfor %}<|assistant|>",
    {"eos_token": "</s>"},
)
SPECIAL = ["</s>", "<|user|>", "<|assistant|>"]


def letters() -> Tokenizer:
    marks = [chr(i) for i in range(32, 127)]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({x: i for i, x in enumerate([*SPECIAL, *marks])}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(SPECIAL)
    return Tokenizer(backend)


def begun(say: Any) -> tuple[Any, float]:
    """What a call gives, and its seconds."""
    began = time.perf_counter()
    made = say()
    return made, time.perf_counter() - began


def talked(lm: kvjax.LM, plan: Any, a: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures of each turn, and of a retry of it."""
    sampler = sampling.chain(sampling.temperature(1.0))
    talk, rows = kvjax.Conversation(lm, sampler=sampler, plan=plan, max_new_tokens=a.new), []
    for number in range(a.turns):
        reply, seconds = begun(lambda talk=talk, n=number: talk.say(f"{n} " + "what is it? " * (a.message // 12)))
        talk = reply.result()
        turn = talk.turns[-1]
        again, retried = begun(talk.retry)
        again.result()
        anew = begun(lambda turn=turn: kvjax.generate(lm, [turn.prompt], max_new_tokens=0, plan=plan))[1]
        rows.append(
            {
                "tokens": len(turn.prompt),
                "fed": turn.fed,
                "seconds": seconds,
                "seconds_anew": anew,
                "seconds_retry": retried,
                "caches": len(talk.kept),
                "bytes": talk.nbytes,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 6), ("width", 384), ("turns", 8), ("message", 120), ("new", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--no-save", action="store_true", help="print only")
    a = parser.parse_args()
    config = Config(letters().vocab_size, a.layers, a.width, a.width // 48, a.width // 48, 48, 8 * a.width // 3)
    lm = kvjax.LM(kvjax.decoder(config, kvjax.init_params(config, jax.random.key(0))), letters(), template=TEMPLATE)
    found = {}
    for plan in (caches.dense(), caches.ring(256), caches.ring(256, slack=256)):
        talked(lm, plan, a)
        found[str(plan)] = rows = talked(lm, plan, a)
        print(
            f"{plan}\n{'turn':>5}{'tokens':>8}{'fed':>6}{'s':>9}{'s anew':>9}{'s retry':>9}{'caches':>8}{'bytes':>14}"
        )
        for number, row in enumerate(rows, 1):
            print(
                f"{number:>5}{row['tokens']:>8}{row['fed']:>6}{row['seconds']:>9.4f}{row['seconds_anew']:>9.4f}"
                f"{row['seconds_retry']:>9.4f}{row['caches']:>8}{row['bytes']:>14,}"
            )
    question = "seconds before a reply begins, with what was kept and anew, and bytes kept"
    result = {"question": question, "arguments": vars(a), "plans": found, **harness.facts()}
    if not a.no_save:
        print(harness.save(f"conversation-{jax.__version__}", result).relative_to(harness.RESULTS.parent.parent))


if __name__ == "__main__":
    main()
