"""What a user of torch would run, one step per line: the other side of `peers.py`.

    python tests/bench/torch_peers.py WORK FOLDER   < requests

A separate process, whose threads are idle while JAX computes. The first line on stdin is the
benchmark's data as JSON and is answered by torch's version; each further line asks for one step and
is answered by `{"seconds": s, "value": v}`, where the value (a loss, metrics, tokens) lets the
other side check that both did the same work. Float32 throughout, eager, transformers' own model and
attention ("sdpa"). Texts arrive as tokens: tokenisation is not part of these times.
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch.nn import functional as F

Data = dict[str, Any]
Batch = dict[str, torch.Tensor]
IGNORED = -100  # a label that transformers ignores
EVAL_BATCH = 32  # OpenUnlearning's for TOFU
K = 0.4  # of its min-k and min-k++


class Work(NamedTuple):
    """A step, which is timed, and what is reported of its result afterwards."""

    step: Callable[[Any], Any]
    report: Callable[[Any], Any] = lambda found: found


def load(folder: str) -> Any:
    """The model as transformers loads it, without the cache that only generation uses."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    return model


def collate(examples: Sequence[Any], pad: int) -> Batch:
    """Examples `(tokens, prompt length)` padded on the right to the longest of them."""
    longest = max(len(tokens) for tokens, _ in examples)
    ids = torch.full((len(examples), longest), pad)
    labels = torch.full((len(examples), longest), IGNORED)
    mask = torch.zeros((len(examples), longest), dtype=torch.long)
    for b, (tokens, prompt) in enumerate(examples):
        ids[b, : len(tokens)] = torch.tensor(tokens)
        labels[b, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
        mask[b, : len(tokens)] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    """The logits of every slot."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def row_nll(model: Any, batch: Batch, form: str) -> torch.Tensor:
    """Summed NLL of each row's labels, in one of two forms.

    `transposed` is OpenUnlearning's (`compute_batch_nll`): the model receives the labels, so it
    computes its own loss as well, and the logits are transposed to (B, V, T). torch then sums the
    vocabulary in strides of T, which takes three times as long, with errors of up to 1e-4 nats per
    token. `flat` does neither.
    """
    if form == "transposed":
        logits, labels = model(**batch).logits[:, :-1].contiguous(), batch["labels"][:, 1:]
        losses = F.cross_entropy(
            logits.transpose(1, 2), labels.contiguous(), ignore_index=IGNORED, reduction="none"
        )
        return losses.sum(-1)
    logits, labels = logits_of(model, batch)[:, :-1], batch["labels"][:, 1:]
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(labels.shape).sum(-1)


def descend(optimizer: Any, model: Any, loss: torch.Tensor) -> float:
    """A step as in Trainer: gradients, clipped at norm 1, into AdamW."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def adamw(model: Any, data: Data) -> Any:
    return torch.optim.AdamW(
        model.parameters(), lr=data["learning_rate"], weight_decay=0.0, fused=True
    )


def npo(folder: str, data: Data) -> Work:
    """NPO with an NLL retain loss; the reference model runs beside the trained one."""
    model = load(folder).train()
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer, beta = adamw(model, data), data["beta"]

    def step(rows: Data) -> float:
        forget, retain = (collate(rows[name], data["pad"]) for name in ("forget", "retain"))
        with torch.no_grad():
            frozen = row_nll(reference, forget, data["form"])
        ratio = frozen - row_nll(model, forget, data["form"])
        loss = -2 / beta * F.logsigmoid(-beta * ratio).mean() + model(**retain).loss
        return descend(optimizer, model, loss)

    return Work(step)


def finetune(folder: str, data: Data) -> Work:
    """The model's own loss (a mean over the labels of the batch)."""
    model = load(folder).train()
    optimizer = adamw(model, data)

    def step(rows: Data) -> float:
        return descend(optimizer, model, model(**collate(rows["train"], data["pad"])).loss)

    return Work(step)


def pretrain(folder: str, data: Data) -> Work:
    """The model's own loss on full rows of tokens; no dropout, as is usual today."""
    model = load(folder).eval()
    optimizer = adamw(model, data)

    def step(request: Data) -> float:
        rows = torch.tensor(request["rows"])
        return descend(optimizer, model, model(input_ids=rows, labels=rows).loss)

    return Work(step)


def generate(folder: str, data: Data) -> Work:
    """Samples from the whole distribution, all of one length."""
    model = load(folder).eval()
    # Nothing ends a sample: a stop token would be forbidden up to the minimum length, and the other
    # side, which has none, would sample from another distribution.
    model.generation_config.eos_token_id = None
    prompt = torch.tensor([data["prompt"]])
    torch.manual_seed(0)

    def step(_: Any) -> torch.Tensor:
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            num_return_sequences=data["samples"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=data["tokens"],
            max_new_tokens=data["tokens"],
            use_cache=True,
            pad_token_id=data["pad"],
        )
        return found[:, prompt.shape[1] :]

    return Work(step, torch.Tensor.tolist)


def labelled(values: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple[torch.Tensor, Any]]:
    """`values` (B, T - 1, ...) at each row's labels, with the labels; the last label is left out.

    It is the end of the text, which OpenUnlearning's token-level metrics ignore.
    """
    for row, mine in zip(values, labels, strict=True):
        places = (mine != IGNORED).nonzero(as_tuple=True)[0][:-1]
        yield row[places - 1], mine[places]


def lowest(scores: torch.Tensor) -> float:
    """Minus the mean of the lowest share `K` of the scores."""
    return -scores.sort().values[: max(1, int(K * len(scores)))].mean().item()


def extraction_strength(hits: torch.Tensor) -> float:
    """The share of the text that follows the last miss, at least one token."""
    first = next((k for k in range(len(hits)) if hits[k:].all()), len(hits) - 1)
    return 1 - first / len(hits)


def likelihood(folder: str, data: Data) -> Work:
    """OpenUnlearning's metrics of a split: each metric makes its own pass over its texts.

    Each perturbed answer is a batch of its own, and min-k++ runs the model twice.
    """
    model, slots, form = load(folder).eval(), 0, ""

    def forward(batch: Batch) -> torch.Tensor:
        nonlocal slots
        slots += batch["input_ids"].numel()
        return logits_of(model, batch)

    def mean_logp(batch: Batch) -> list[float]:
        nonlocal slots
        slots += batch["input_ids"].numel()
        return (-row_nll(model, batch, form) / (batch["labels"] != IGNORED).sum(-1)).tolist()

    def everywhere(batch: Batch) -> Any:
        return labelled(F.log_softmax(forward(batch), -1)[:, :-1], batch["labels"])

    def tokens(batch: Batch) -> Any:
        logp = F.log_softmax(forward(batch), -1)[:, :-1]
        chosen = logp.gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        return labelled(chosen, batch["labels"])

    def hits(batch: Batch) -> Iterator[torch.Tensor]:
        return (logp.argmax(-1) == labels for logp, labels in everywhere(batch))

    def min_k_plus_plus(batch: Batch) -> Iterator[float]:
        for (logp, _), (mine, _) in zip(everywhere(batch), tokens(batch), strict=True):
            mu = (logp.exp() * logp).sum(-1)
            var = (logp.exp() * logp.square()).sum(-1) - mu.square()
            yield lowest((mine - mu) / var.clamp(min=1e-6).sqrt())

    def over(examples: Sequence[Any], metric: Callable[[Batch], Any]) -> list[float]:
        """A pass over a split, in its order; one value per row."""
        cuts = range(0, len(examples), EVAL_BATCH)
        batches = (collate(examples[i : i + EVAL_BATCH], data["pad"]) for i in cuts)
        return [value for batch in batches for value in metric(batch)]

    def step(asked: str) -> dict[str, float]:
        nonlocal slots, form
        slots, form, answers = 0, asked, data["answers"]
        sizes = [len(zlib.compress(text.encode())) for text in data["texts"]]
        with torch.inference_mode():
            found = {
                "answers": over(answers, mean_logp),
                "paraphrased": over(data["paraphrased"], mean_logp),
                "perturbed": [x for wrong in data["perturbed"] for x in over(wrong, mean_logp)],
                "extraction_strength": over(answers, lambda b: map(extraction_strength, hits(b))),
                "exact_memorization": over(answers, lambda b: (h.float().mean() for h in hits(b))),
                "loss": [-x for x in over(answers, mean_logp)],
                "zlib": [-x / n for x, n in zip(over(answers, mean_logp), sizes, strict=True)],
                "min_k": over(answers, lambda b: (lowest(logp) for logp, _ in tokens(b))),
                "min_k_plus_plus": over(answers, min_k_plus_plus),
            }
        return {name: float(sum(x) / len(x)) for name, x in found.items()} | {"slots": slots}

    return Work(step)


def zeroth(folder: str, data: Data) -> tuple[Any, list[Any], Callable[[], float]]:
    """The model, its parameters, and the loss of the batch."""
    model = load(folder).eval().requires_grad_(False)
    batch = collate(data["train"], data["pad"])

    def loss() -> float:
        with torch.inference_mode():
            return model(**batch).loss.item()

    return model, list(model.parameters()), loss


def mezo(folder: str, data: Data) -> Work:
    """MeZO in place: only the seed of a direction is kept (Malladi et al., `zo_step`)."""
    _, parameters, loss = zeroth(folder, data)
    eps, seeds, known = data["eps"], itertools.count(), loss()

    def move(seed: int, factor: float) -> None:
        torch.manual_seed(seed)
        for p in parameters:
            p.add_(torch.normal(mean=0.0, std=1.0, size=p.shape, dtype=p.dtype), alpha=factor)

    def step(_: Any) -> None:
        seed = next(seeds)
        move(seed, eps)
        above = loss()
        move(seed, -2 * eps)
        below = loss()
        move(seed, eps)
        move(seed, -data["learning_rate"] * (above - below) / (2 * eps))

    def report(_: Any) -> dict[str, float]:
        """The loss before the step; MeZO itself never sees it."""
        nonlocal known
        before, known = known, loss()
        return {"loss": before}

    return Work(step, report)


def newton_schulz(x: torch.Tensor) -> torch.Tensor:
    """Muon's five steps, on the wide side."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def orthonormal(rows: int, rank: int) -> torch.Tensor:
    q, r = torch.linalg.qr(torch.randn(rows, min(rows, rank)))
    return q * r.diagonal().sign()


def zo_muon(folder: str, data: Data) -> Work:
    """ZO-Muon in place (Lang et al., `lowdim_zo_step`), forward differences, one P for all queries.

    The draws that are kept for the update also undo a perturbation; the authors' code draws them a
    second time.
    """
    _, parameters, loss = zeroth(folder, data)
    eps, queries, count = data["eps"], data["queries"], itertools.count()
    torch.manual_seed(0)
    bases: list[Any] = []
    cores: list[torch.Tensor] = []

    def move(directions: list[torch.Tensor], factor: float) -> None:
        for p, basis, direction in zip(parameters, bases, directions, strict=True):
            if basis is None:
                p.add_(direction, alpha=factor)
            else:
                p.addmm_(basis, direction, alpha=factor)

    def step(_: Any) -> float:
        if next(count) % data["refresh"] == 0:
            bases[:] = [
                orthonormal(len(p), data["rank"]) if p.ndim > 1 else None for p in parameters
            ]
        start, draws, slopes = loss(), [], []
        for _ in range(queries):
            draws.append(
                [
                    torch.randn_like(p)
                    if basis is None
                    else torch.randn(basis.shape[1], *p.shape[1:])
                    for p, basis in zip(parameters, bases, strict=True)
                ]
            )
            move(draws[-1], eps)
            slopes.append((loss() - start) / eps)
            move(draws[-1], -eps)
        cores.clear()
        for p, basis, mine in zip(parameters, bases, zip(*draws, strict=True), strict=True):
            mean = sum(slope * u for slope, u in zip(slopes, mine, strict=True)) / queries
            if basis is None:
                p.add_(mean, alpha=-data["vector_rate"])
            else:
                cores.append(newton_schulz(mean))
                p.addmm_(basis, cores[-1], alpha=-data["learning_rate"])
        return start

    def report(start: float) -> dict[str, float]:
        """The loss before the step, and how far it moved the matrices (bases preserve norms)."""
        squares = sum(core.square().sum().item() for core in cores)
        return {"loss": start, "update_norm": data["learning_rate"] * squares**0.5}

    return Work(step, report)


WORKS: dict[str, Callable[[str, Data], Work]] = {
    "npo": npo,
    "finetune": finetune,
    "pretrain": pretrain,
    "generate": generate,
    "likelihood": likelihood,
    "mezo": mezo,
    "zo-muon": zo_muon,
}


def serve(works: Mapping[str, Callable[[str, Data], Work]], argv: list[str]) -> None:
    """Answer the requests on stdin."""
    name, folder = argv
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    work = works[name](folder, json.loads(sys.stdin.readline()))
    print(json.dumps({"torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        found = work.step(request)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "value": work.report(found)}), flush=True)


if __name__ == "__main__":
    serve(WORKS, sys.argv[1:])
