"""Generation against a scan and a plain loop without a cache; samples do not depend on batches."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import stats

from models import chunks as planning
from models.decoder import generate as module
from models.decoder.generate import SamplingConfig, generate
from models.decoder.model import Decoder, DecoderConfig
from models.decoder.sampling import BLOCK, gumbel_max, nucleus, row_keys, sample_tokens

DECODER = Decoder(DecoderConfig(61, 32, 48, 2, 4, 2, 8))
STOPS = (3, 17, 42)
NEW = 20
SAMPLED = SamplingConfig(temperature=1.0, max_new_tokens=NEW)
GREEDY = SamplingConfig(max_new_tokens=NEW)
CONFIGS = {
    "greedy": GREEDY,
    "plain": SAMPLED,
    "top-p": SamplingConfig(0.8, 0.9, 0, NEW),
    "top-k, top-p": SamplingConfig(1.3, 0.8, 10, NEW),
}


@pytest.fixture(scope="module")
def params():
    def livelier(path, x):
        # With its initial weights, a model this small hardly depends on its input.
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return x if name.endswith(("scale", "q/kernel", "k/kernel")) else 8.0 * x

    return jax.tree_util.tree_map_with_path(livelier, jax.jit(DECODER.init)(jax.random.key(0)))


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(4, 61, n).tolist() for n in (5, 1, 12, 7, 3, 9, 20)]


def answer(params, prompts, sampling=SAMPLED, **options):
    """Few shapes, so few compilations: eight rows and one prompt length unless overridden."""
    fixed = {"stop_ids": STOPS, "pad_id": 0, "seed": 11, "batch_size": 8, "prompt_buckets": (24,)}
    fixed |= options
    return generate(DECODER, params, prompts, sampling=sampling, **fixed)


@functools.partial(jax.jit, static_argnames=("sampling",))
def scan_oracle(params, prompt, key, sampling):
    """One row: the prompt token by token, then the answer, in one `lax.scan` of fixed length."""
    length = prompt.shape[1]

    def step(carry, t):
        cache, token = carry
        token = jnp.where(t < length, prompt[:, jnp.minimum(t, length - 1)], token)
        hidden, found = DECODER.forward(params, token[:, None], cache=cache)
        token = sample_tokens(
            DECODER.unembed(params, hidden[:, 0]),
            jax.vmap(lambda k: jax.random.fold_in(k, jnp.maximum(t - length + 1, 0)))(key),
            sampling.temperature or 1.0,
            sampling.top_p,
            top_k=sampling.top_k,
            greedy=sampling.temperature == 0,
        )
        return (found["cache"], token), token

    steps = length + sampling.max_new_tokens - 1
    first = (DECODER.init_cache(1, steps), prompt[:, 0])
    _, tokens = jax.lax.scan(step, first, jnp.arange(steps))
    return tokens[length - 1 :, 0]


def cut(tokens):
    """Up to the first stop token."""
    tokens = np.asarray(tokens).tolist()
    return tokens[: next((i for i, t in enumerate(tokens) if t in STOPS), len(tokens))]


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_scan_token_for_token(params, prompts, name):
    sampling = CONFIGS[name]
    found = answer(params, prompts[:4], sampling, num_samples=2)
    lengths = set()
    for i, samples in enumerate(found):
        for j, tokens in enumerate(samples):
            key = row_keys(11, [i], [0 if name == "greedy" else j])
            expected = cut(scan_oracle(params, jnp.array([prompts[i]]), key, sampling))
            assert tokens == expected, (i, j)
            lengths.add(len(expected))
    assert len(lengths) > 1  # the test covers early and late stops


def test_greedy_equals_a_plain_loop_without_cache(params, prompts):
    width = 20 + NEW

    @jax.jit
    def next_token(tokens, last):
        hidden, _ = DECODER.forward(params, tokens)
        return jnp.argmax(DECODER.unembed(params, hidden[0, last]))

    for prompt, samples in zip(prompts, answer(params, prompts, GREEDY), strict=True):
        tokens = list(prompt)
        for _ in range(NEW):
            padded = jnp.array([tokens + [0] * (width - len(tokens))])
            token = int(next_token(padded, len(tokens) - 1))
            if token in STOPS:
                break
            tokens.append(token)
        assert samples == [tokens[len(prompt) :]]


@pytest.mark.parametrize("pad", [0, 7])
def test_masked_pad_ids_take_no_position_in_generation(params, pad):
    """As transformers counts them; against a loop without a cache that leaves them out."""
    decoder = Decoder(dataclasses.replace(DECODER.config, unattended=7))
    prompts = [[5, 9, 7, 11, 12], [8, 7, 7, 10], [6, 13, 14, 15, 16, 7, 17]]
    options = {"stop_ids": (7,), "pad_id": pad, "prompt_buckets": (24,), "sampling": GREEDY}
    found = generate(decoder, params, prompts, **options)
    other = generate(DECODER, params, prompts, **options)
    assert found != other

    @jax.jit
    def next_token(tokens, last):
        hidden, _ = DECODER.forward(params, tokens)
        return jnp.argmax(DECODER.unembed(params, hidden[0, last]))

    for prompt, (answer,) in zip(prompts, found, strict=True):
        seen = [token for token in prompt if token != 7]
        start = len(seen)
        while len(seen) < start + NEW:
            padded = jnp.array([seen + [0] * (32 - len(seen))])
            token = int(next_token(padded, len(seen) - 1))
            if token == 7:
                break
            seen.append(token)
        assert answer == seen[start:]


def test_a_sample_belongs_to_its_row(params, prompts):
    ids = [100 + i for i in range(len(prompts))]
    alone = answer(params, prompts, row_ids=ids, num_samples=3)
    found = [tuple(x) for samples in alone for x in samples if x]
    assert len(set(found)) == len(found) > 15
    # Other batch sizes, padding, order and batch-mates.
    assert answer(params, prompts, row_ids=ids, num_samples=3, batch_size=4) == alone
    assert answer(params, prompts, row_ids=ids, num_samples=3, prompt_buckets=None) == alone
    assert answer(params, prompts[::-1], row_ids=ids[::-1], num_samples=3)[::-1] == alone
    assert answer(params, prompts[2:4], row_ids=ids[2:4], num_samples=3) == alone[2:4]
    assert [x[:2] for x in alone] == answer(params, prompts, row_ids=ids, num_samples=2)
    assert answer(params, prompts, row_ids=ids, num_samples=3, seed=jax.random.key(11)) == alone
    assert answer(params, prompts, row_ids=ids, num_samples=3, seed=12) != alone
    assert answer(params, prompts, num_samples=3) != alone


def test_finished_rows_leave_the_batch_unnoticed(params, prompts, monkeypatch):
    whole = answer(params, prompts, num_samples=2, batch_size=8)
    monkeypatch.setattr(module, "COMPACT_FLOPS", 0.0)
    monkeypatch.setattr(module, "SEGMENT", 3)
    assert answer(params, prompts, num_samples=2, batch_size=8) == whole


@pytest.mark.parametrize("window", [None, 9])
def test_samples_share_their_prompt_unnoticed(params, prompts, monkeypatch, window):
    """Rows of one prompt, of several, and each with a copy: the same answers."""
    decoder = Decoder(dataclasses.replace(DECODER.config, sliding_window=window))
    options = {"stop_ids": STOPS, "pad_id": 0, "seed": 11, "prompt_buckets": (24,)}
    options |= {"sampling": SAMPLED, "num_samples": 6}
    plans, plan = [], module.make_plan

    def noted(*args):
        plans.append(plan(*args))
        return plans[-1]

    monkeypatch.setattr(module, "make_plan", noted)
    copied = generate(decoder, params, prompts[:3], batch_size=1, **options)
    for compact in (1e11, 0.0):
        monkeypatch.setattr(module, "COMPACT_FLOPS", compact)
        for size in (4, 8, 12):
            assert generate(decoder, params, prompts[:3], batch_size=size, **options) == copied
    assert [p.beside for p in plans] == [1, 3, 6, 6, 3, 6, 6]
    assert [p.rows for p in plans] == [1, 3, 6, 12, 3, 6, 12]


def test_every_plan_decodes_every_sample_once_within_bounds():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        prompts, samples, most, width, room = (int(n) for n in rng.integers(1, 70, 5))
        slots, shards = int(rng.integers(1, 20000)), int(rng.choice([1, 2, 3, 8]))
        plan = planning.make_plan(prompts, samples, most, slots, width, room, shards)
        case = prompts, samples, most, slots, width, room, shards, plan
        assert plan.rows % plan.beside == plan.rows % shards == plan.prefilled % shards == 0, case
        if plan.rows > shards:
            copies = plan.rows if plan.beside == 1 else plan.rows // plan.beside
            assert plan.rows <= most and plan.rows * room + copies * width <= slots, case
        seen = []
        for first in range(0, prompts, plan.prefilled):
            for chunk in planning.chunks(min(plan.prefilled, prompts - first), samples, plan):
                assert len(chunk) == plan.rows and any(chunk), case
                seen += [(first + job[0], job[1]) for job in chunk if job is not None]
                parts = [chunk[i : i + plan.beside] for i in range(0, plan.rows, plan.beside)]
                if plan.beside > 1:
                    assert all(len({job[0] for job in part if job}) <= 1 for part in parts), case
                    # On a mesh a device's rows have their prompts there, or there is one prompt.
                    assert len(parts) == 1 or len(parts) % shards == 0, case
        assert sorted(seen) == [(i, j) for i in range(prompts) for j in range(samples)], case


def test_dropping_rows_never_takes_more_memory(params, prompts, monkeypatch):
    """Short answers to two long prompts: half of the rows with copies would be larger than all."""
    seen, select = [], module._select

    def noted(rows, draw, prompt, which, count):
        chosen = select(rows, draw, prompt, which, count)
        slots = [r.cache["segment_ids"].size for r in (rows, chosen[0])]
        shared = [0 if p is None else p["segment_ids"].size for p in (prompt, chosen[2])]
        seen.append(tuple(map(sum, zip(slots, shared, strict=True))))
        return chosen

    monkeypatch.setattr(module, "_select", noted)
    monkeypatch.setattr(module, "COMPACT_FLOPS", 0.0)
    monkeypatch.setattr(module, "SEGMENT", 1)
    for width in (24, 200):
        options = {"num_samples": 8, "batch_size": 32, "prompt_buckets": (width,)}
        options["stop_ids"] = tuple(range(20))
        answer(params, prompts[:4], dataclasses.replace(SAMPLED, max_new_tokens=8), **options)
    assert seen and all(after <= before for before, after in seen)


@pytest.mark.fused
def test_the_prompt_of_many_samples_is_read_once(params):
    """No array of the program holds the prompt's keys for every sample."""
    batch, width, room = 16, 40, 9
    prompt = module.prefill(DECODER, params, jnp.ones((1, width), jnp.int32), jnp.full((1,), width))
    ones = jnp.ones((batch,), jnp.int32)
    draw = module.Draw(
        row_keys(0, ones, ones), width * ones, room * ones, ones[:1], jnp.float32(1), jnp.float32(1)
    )
    static = {"top_k": 0, "greedy": False}
    rows = module._begin(
        *(DECODER, params, prompt, 0 * ones, ones > 1, draw),
        **(static | {"max_new": room, "shared": True}),
    )
    assert rows.cache["k"].shape == (2, batch, room - 1, 2, 8)
    program = module.advance.lower(
        DECODER, params, rows, draw, jnp.int32(5), prompt[0], **static
    ).compile()
    sizes = {
        tuple(int(n) for n in shape.split(","))
        for shape in re.findall(r"f32\[([\d,]+)\]", program.as_text())
    }
    assert (2, 1, width, 2, 8) in sizes and (2, batch, room - 1, 2, 8) in sizes
    copies = batch * width * 2 * 8
    assert not [s for s in sizes if math.prod(s) == copies and width in s]


def test_a_prompt_is_prefilled_once(params, prompts, monkeypatch):
    seen, prefill = [], module.prefill

    def count(decoder, params, tokens, lengths):
        seen.append(tokens.shape)
        return prefill(decoder, params, tokens, lengths)

    monkeypatch.setattr(module, "prefill", count)
    shared = answer(params, prompts[:1], num_samples=7, batch_size=4)
    assert seen == [(1, 24)]
    for size in (1, 8):
        assert answer(params, prompts[:1], num_samples=7, batch_size=size) == shared
    # The same as seven separate rows with the same ids: sample 0 of row 0 is one of them.
    rows = answer(params, prompts[:1] * 7, row_ids=[0] * 7)
    assert rows == [shared[0][:1]] * 7


def test_stop_ids_and_length(params, prompts):
    free = answer(params, prompts, stop_ids=())
    assert all(len(samples[0]) == NEW for samples in free)
    for stop in ((17,), STOPS):
        for with_stop, without in zip(answer(params, prompts, stop_ids=stop), free, strict=True):
            first = next((i for i, t in enumerate(without[0]) if t in stop), NEW)
            assert with_stop[0] == without[0][:first]
    short = dataclasses.replace(SAMPLED, max_new_tokens=1)
    assert answer(params, prompts, short, stop_ids=()) == [[x[0][:1]] for x in free]


def test_an_answer_ends_with_the_context(params, prompts):
    decoder = Decoder(dataclasses.replace(DECODER.config, max_position_embeddings=22))
    options = {"sampling": SAMPLED, "stop_ids": (), "pad_id": 0}
    found = generate(decoder, params, prompts, **options)
    assert [len(x[0]) for x in found] == [min(NEW, 22 - len(p)) for p in prompts]
    for bad in ([], list(range(22))):
        with pytest.raises(ValueError, match="prompt 1 has"):
            generate(decoder, params, [[1], bad], **options)


def test_edges(params, prompts):
    assert answer(params, []) == []
    with pytest.raises(ValueError, match="row_ids"):
        answer(params, prompts, row_ids=[1])
    for bad in ({"num_samples": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=">= 1"):
            answer(params, prompts, **bad)
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SamplingConfig(**bad)
    counted = []
    answer(params, prompts, num_samples=3, batch_size=4, progress=counted.append)
    answer(params, prompts, GREEDY, num_samples=3, progress=counted.append)
    assert sum(counted) == 2 * 3 * len(prompts)
    # A budget below one row's cache still decodes, row by row.
    assert answer(params, prompts[:2], cache_bytes=1) == answer(params, prompts)[:2]


def test_equal_buckets_and_a_sweep_compile_once(params, prompts):
    def compiled():
        return module.prefill._cache_size(), module.advance._cache_size()

    odd = Decoder(dataclasses.replace(DECODER.config, norm_eps=1.1e-5))  # nothing cached for it
    options = {"stop_ids": (1,), "pad_id": 0, "num_samples": 2}
    before = compiled()
    for heat, top_p in ((0.5, 1.0), (1.0, 0.9), (1.5, 0.3)):
        for some in (prompts[3:6], [[1, 2, 3], [4], [5] * 9]):
            generate(odd, params, some, sampling=SamplingConfig(heat, top_p, 0, 8), **options)
    assert [b - a for a, b in zip(before, compiled(), strict=True)] == [1, 1]


@pytest.mark.fused
def test_the_cache_is_updated_in_place(params):
    batch, slots, room = 8, 24, 200
    decoder = Decoder(dataclasses.replace(DECODER.config, num_layers=8))
    deep = jax.tree.map(lambda x: jnp.repeat(x, 4, 0), params["layers"])
    params = params | {"layers": deep}
    tokens = jnp.ones((batch, slots), jnp.int32)
    full = jnp.full((batch,), slots)
    draw = module.Draw(
        row_keys(0, range(batch), range(batch)),
        full,
        full,
        jnp.array([1]),
        jnp.float32(1.0),
        jnp.float32(1.0),
    )
    static = {"top_k": 0, "greedy": False}
    prompt = module.prefill(decoder, params, tokens, full)
    idle = jnp.zeros((batch,), bool)
    rows = module._begin(
        decoder, params, prompt, jnp.arange(batch), idle, draw, max_new=room, **static
    )
    program = module.advance.lower(decoder, params, rows, draw, jnp.int32(5), **static).compile()
    shape = "f32[" + ",".join(map(str, rows.cache["k"].shape)) + "]"
    text = program.as_text()
    assert "dynamic-update-slice" in text and shape in text
    copies = [x for x in text.splitlines() if " copy(" in x and shape in x.split(" copy(")[0]]
    assert not copies
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * rows.cache["k"].nbytes
    assert memory.temp_size_in_bytes < rows.cache["k"].nbytes


def test_a_mesh_changes_nothing(params, prompts):
    axes = ("data", "fsdp")
    mesh = jax.make_mesh((2, 2), axes, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = jax.device_put(params, NamedSharding(mesh, P()))
    alone = answer(params, prompts[:3], num_samples=3)
    for sharding in (None, NamedSharding(mesh, P(axes))):
        assert answer(placed, prompts[:3], num_samples=3, sharding=sharding) == alone


def test_heads_that_tp_does_not_divide(prompts):
    decoder = Decoder(DecoderConfig(61, 24, 48, 2, 3, 3, 8))
    params = jax.jit(decoder.init)(jax.random.key(0))
    options = {"sampling": SAMPLED, "stop_ids": STOPS, "pad_id": 0, "num_samples": 4}
    options |= {"prompt_buckets": (24,), "batch_size": 8}
    axes = ("data", "fsdp", "tp")
    mesh = jax.make_mesh((1, 2, 2), axes, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    placed = jax.device_put(params, NamedSharding(mesh, P()))
    rows = NamedSharding(mesh, P(axes[:2]))
    alone = generate(decoder, params, prompts[:4], **options)
    assert generate(decoder, placed, prompts[:4], sharding=rows, **options) == alone


# One step --------------------------------------------------------------------------------------


def draws(logits, count, temperature=1.0, top_p=1.0, top_k=0):
    keys = jax.random.split(jax.random.key(3), count)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    run = jax.jit(functools.partial(sample_tokens, top_k=top_k))
    return np.bincount(np.asarray(run(rows, keys, temperature, top_p)), minlength=len(logits))


def expected_distribution(logits, temperature, top_p, top_k):
    """Temperature, top-k, top-p by sorting, in float64."""
    order = np.argsort(-logits, kind="stable")
    kept = order[: top_k or None]
    p = np.exp((logits[kept] - logits.max()) / temperature)
    p /= p.sum()
    kept = kept[np.cumsum(p) - p < top_p]
    result = np.zeros(len(logits))
    result[kept] = np.exp((logits[kept] - logits.max()) / temperature)
    return result / result.sum()


@pytest.mark.parametrize("size", [12, 700])
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.5, 1.0, 0), (1.5, 0.8, 0), (1.0, 1.0, 5), (0.7, 0.9, 7), (1.0, 1e-6, 0)],
)
def test_frequencies(size, temperature, top_p, top_k):
    logits = 2.0 * np.random.default_rng(size).normal(size=size)
    expected = expected_distribution(logits, temperature, top_p, top_k)
    count = 20_000
    found = draws(logits, count, temperature, top_p, top_k)
    assert not found[expected == 0].any()
    common = expected * count >= 5
    observed = np.append(found[common], found[~common].sum())
    wanted = np.append(expected[common] * count, expected[~common].sum() * count)
    keep = wanted > 0
    if keep.sum() > 1:
        assert stats.chisquare(observed[keep], wanted[keep]).pvalue > 1e-3


def test_small_temperatures_take_the_likeliest():
    logits = jax.random.normal(jax.random.key(1), (50, 600))
    keys = jax.random.split(jax.random.key(2), 50)
    best = jnp.argmax(logits, -1)
    np.testing.assert_array_equal(sample_tokens(logits, keys, 1.0, 1.0, greedy=True), best)
    for heat, top_p, top_k in ((1e-4, 1.0, 0), (1e-30, 1.0, 0), (5.0, 1e-9, 0), (5.0, 1.0, 1)):
        found = sample_tokens(1e3 * logits, keys, heat, top_p, top_k=top_k)
        np.testing.assert_array_equal(found, best)


def test_the_nucleus_equals_the_sorted_one():
    logits = 3.0 * jax.random.normal(jax.random.key(4), (20, 1000))
    for top_p in (0.05, 0.5, 0.9, 0.999):
        kept = np.asarray(nucleus(logits, top_p)) > -np.inf
        for row, mine in zip(np.asarray(logits, np.float64), kept, strict=True):
            np.testing.assert_array_equal(mine, expected_distribution(row, 1.0, top_p, 0) > 0)
    ties = jnp.log(jnp.array([[0.1, 0.4, 0.1, 0.4]]))
    assert (nucleus(ties, 0.3) > -jnp.inf).tolist() == [[False, True, False, True]]
    assert (nucleus(ties, 0.81) > -jnp.inf).all()


def test_empty_blocks_are_never_drawn():
    logits = jnp.full((64, 3 * BLOCK + 5), -jnp.inf).at[:, [BLOCK + 1, 3 * BLOCK + 2]].set(0.0)
    found = gumbel_max(logits, jax.random.split(jax.random.key(0), 64))
    assert set(found.tolist()) == {BLOCK + 1, 3 * BLOCK + 2}


def test_keys_differ_by_row_sample_and_seed():
    rows, samples = np.divmod(np.arange(100), 10)
    data = np.concatenate([jax.random.key_data(row_keys(s, rows, samples)) for s in (0, 1)])
    assert len(np.unique(data, axis=0)) == 200
