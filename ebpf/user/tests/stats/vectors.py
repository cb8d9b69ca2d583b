"""Writes vectors.json: samples, and what SciPy makes of them.

    python3 -m venv scipy && scipy/bin/pip install scipy==1.17.1 && scipy/bin/python vectors.py > vectors.json

p-values are of the one-sided alternative that the second sample is larger.
"""

import json
from itertools import combinations

import numpy as np
from scipy import stats

rng = np.random.default_rng(6)


def lognormal(n, shift=0):
    """Durations as blackouts have them: skewed, with outliers."""
    return (np.exp(rng.normal(13, 0.4, n)).astype(int) + shift).tolist()


def by_permutation(first, second):
    """Every way to deal the ranks out: exact with ties, and slow."""
    ranks = stats.rankdata(first + second)
    seen = ranks[len(first):].sum()
    sums = [sum(chosen) for chosen in combinations(ranks, len(second))]
    return sum(s >= seen - 1e-9 for s in sums) / len(sums)


cases = []
for m, n, shift in [(4, 4, 0), (5, 5, 400_000), (5, 9, 100_000), (20, 20, 0),
                    (20, 20, 80_000), (12, 30, 50_000), (30, 12, 150_000)]:
    first, second = lognormal(m), lognormal(n, shift)
    p = stats.mannwhitneyu(second, first, alternative="greater", method="exact").pvalue
    cases.append({"kind": "exact", "first": first, "second": second, "p": p})
for m, n, levels in [(5, 5, 4), (4, 8, 3), (8, 6, 5), (9, 9, 12), (6, 6, 1)]:
    first, second = rng.integers(0, levels, m).tolist(), rng.integers(0, levels + 1, n).tolist()
    cases.append({"kind": "ties", "first": first, "second": second, "p": by_permutation(first, second)})
for m, n, levels in [(200, 200, 1_000_000), (150, 400, 40), (500, 90, 300)]:
    first, second = rng.integers(0, levels, m).tolist(), (rng.integers(0, levels, n) + levels // 12).tolist()
    p = stats.mannwhitneyu(second, first, alternative="greater", method="asymptotic").pvalue
    cases.append({"kind": "normal", "first": first, "second": second, "p": p})
for case in cases:
    first, second = np.array(case["first"]), np.array(case["second"])
    case["shift"] = float(np.median(np.subtract.outer(second, first)))
print(json.dumps(cases, indent=None, separators=(",", ":")).replace('{"kind"', '\n{"kind"'))
