"""The contract of a cache on its hard cases: that it can say them.

    python benchmarks/contract.py --check
    python benchmarks/contract.py --check --only "tree drafts"

Every hard case is compared with its reference, and a broken twin has to fail. What kinds cost is `kinds.py`'s.
"""

from __future__ import annotations

import argparse
import sys

import jax
from contract_cases import BROKEN, CASES, EXACT


def check(only: list[str], full: bool = True) -> int:
    """Prints every case and its negative control; how many failed."""
    failed = 0
    for name, case in CASES.items():
        if only and name not in only:
            continue
        found = case(False, full)
        worst = max(found.values())
        control = max(case(True, False).values())
        good = worst <= EXACT and control > BROKEN
        failed += not good
        print(f"{'ok' if good else 'FAILED':7}{name:45}{worst:9.1e}  broken twin {control:8.1e}", flush=True)
        for part, value in found.items():
            print(f"{'':9}{part:43}{value:9.1e}", flush=True)
    print(f"jax {jax.__version__}, {jax.default_backend()}: largest difference over largest logit, at most {EXACT:g}")
    return failed


def main(arguments: list[str] | None = None) -> int:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="equality with references, and broken twins")
    parser.add_argument("--only", nargs="*", default=[], choices=list(CASES), metavar="CASE", help="of --check")
    parser.add_argument("--quick", action="store_true", help="prefill and one scan only")
    options = parser.parse_args(arguments)
    if not options.check:
        parser.print_help()
        return 0
    return 1 if check(options.only, not options.quick) else 0


if __name__ == "__main__":
    sys.exit(main())
