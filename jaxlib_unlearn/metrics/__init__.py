"""How an unlearned model is judged: host-side numpy, one idea a file.

`leak` best-of-k leakage, `likelihood` scores of one text from its token log-probabilities,
`text` overlap and repetition, `privacy` membership inference and distribution tests, `eval_log`
logs per item read from files, `tofu` their aggregates and how they are written.
"""

from jaxlib_unlearn.metrics.leak import leak_at_k as leak_at_k
