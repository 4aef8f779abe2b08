"""A beam search of a few lines in plain Python: what tests and scripts/beams_golden.py compare with. No jax here."""

from __future__ import annotations

import math


def beam_search(prompt, budget, width, score, *, penalty=1.0, early=False, stops=(), given=None, gaps=None):
    """Finished texts with scores, best first, and how often a beam went on from another place.

    `score(text)` are log-probabilities of the token after it, -inf for what may not come; what comes after the first
    `given` tokens counts. `gaps` is a list that gets how much what was chosen was ahead of what was not, in
    log-probabilities.
    """
    given = len(prompt) if given is None else given
    gaps = [] if gaps is None else gaps
    running, finished, crossed = [(0.0, tuple(prompt))], [], 0

    def apart(a, b):
        """Of two finished texts."""
        return (a[0] - b[0]) * (min(len(a[1]), len(b[1])) - given) ** penalty

    def best(listed, apart=lambda a, b: a[0] - b[0]):
        listed = sorted(listed, key=lambda x: -x[0])
        gaps.extend(apart(a, b) for a, b in zip(listed[width - 1 :], listed[width : width + 1], strict=False))
        return listed[:width]

    for n in range(1, budget + 1):
        count, every = len(prompt) + n - given, []
        for place, (total, text) in enumerate(running):
            every += [(total + s, place, (*text, i)) for i, s in enumerate(score(text)) if s > -math.inf]
        ended = [x for x in best(every) if x[2][-1] in stops or n == budget]
        finished = best(finished + [(total / count**penalty, text) for total, _, text in ended], apart)
        chosen = best([x for x in every if x[2][-1] not in stops])
        if not chosen:
            break
        crossed += [place for _, place, _ in chosen] != list(range(len(running)))
        running = [(total, text) for total, _, text in chosen]
        if len(finished) == width:
            reach = budget + len(prompt) - given if early == "never" and penalty > 0 else count
            ahead = finished[-1][0] - running[0][0] / reach**penalty
            if early is not True and n < budget:
                gaps.append(abs(ahead) * min(reach, len(finished[-1][1]) - given) ** penalty)
            if early is True or ahead >= 0:
                break
    gaps.extend(apart(a, b) for a, b in zip(finished, finished[1:], strict=False))
    return [(list(text[len(prompt) :]), s) for s, text in finished], crossed
