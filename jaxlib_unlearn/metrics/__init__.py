"""Metrics of unlearned models, in host-side numpy, one topic per file.

`leak` best-of-k leakage, `likelihood` scores of one text from its token log-probabilities,
`text` overlap and repetition, `privacy` membership inference and distribution tests, `eval_log`
per-item logs read from files, `tofu` their aggregates and how logs are written, `images` attacks on
image models and the distance of two sets of images.
"""

from jaxlib_unlearn.metrics.leak import leak_at_k as leak_at_k
