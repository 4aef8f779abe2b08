"""The proof, public: `check_equivalence` on a model of one's own, the contract suite for a kind of one's own, mutants.

Needs no test runner. `import kvjax` does not import it; `kvjax.testing` does.
"""

from kvjax.testing import mutants
from kvjax.testing.algorithms import beam, drafted, greedy, sampled, until
from kvjax.testing.cases import Case
from kvjax.testing.contract import REFUSED, SuiteReport, run_suite, suite
from kvjax.testing.equivalence import Report, against, check_equivalence

__all__ = [
    "Case",
    "REFUSED",
    "Report",
    "SuiteReport",
    "against",
    "beam",
    "check_equivalence",
    "drafted",
    "greedy",
    "mutants",
    "run_suite",
    "sampled",
    "suite",
    "until",
]
