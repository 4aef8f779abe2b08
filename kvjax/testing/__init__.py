"""The proof, public: `check_equivalence` on a model of one's own, the contract suite for a kind of one's own, mutants.

Needs no test runner. `import kvjax` does not import it; `kvjax.testing` does.
"""

from kvjax.testing import mutants
from kvjax.testing.algorithms import beam, drafted, greedy, sampled, until
from kvjax.testing.cases import Case
from kvjax.testing.contract import REFUSED, SuiteReport, run_suite, suite
from kvjax.testing.equivalence import Report, against, check_equivalence

__all__ = [
    "check_equivalence",
    "greedy",
    "sampled",
    "until",
    "drafted",
    "beam",
    "against",
    "Report",
    "Case",
    "suite",
    "run_suite",
    "SuiteReport",
    "mutants",
    "REFUSED",
]
