"""SmolLM2-135M-Instruct from its GGUF file against numbers recorded from transformers and torch."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models

pytestmark = pytest.mark.optimised

LENGTH = 48  # one compiled length for every text here


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "data" / "smollm2_golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    return models.load(smollm2_path)


@pytest.fixture(scope="module")
def logits_of(smollm2):
    """Token ids to logits `(n, V)`, padded to one length on the right."""

    @jax.jit
    def run(params, tokens, segment_ids):
        hidden, _ = smollm2.forward(params, tokens, segment_ids=segment_ids)
        return smollm2.unembed(params, hidden)[0]

    def logits(ids):
        tokens = np.zeros((1, LENGTH), np.int32)
        tokens[0, : len(ids)] = ids
        mask = jnp.asarray(np.arange(LENGTH)[None] < len(ids), jnp.int32)
        return np.asarray(run(smollm2.params, jnp.asarray(tokens), mask))[: len(ids)]

    return logits


def test_the_package_is_found_by_the_program_too(smollm2_path):
    assert models.find_smollm2() == smollm2_path


def test_token_ids(golden, smollm2):
    for case in golden["tokenization"]:
        ids = smollm2.tokenizer.encode(case["text"])
        assert ids == case["ids"], case["text"]
        assert smollm2.tokenizer.decode(ids, skip_special_tokens=False) == case["text"]


def test_chat(golden, smollm2):
    text = smollm2.tokenizer.chat(golden["chat"]["messages"], add_generation_prompt=True)
    assert text == golden["chat"]["text"]
    assert smollm2.tokenizer.encode(text) == golden["chat"]["ids"]
    assert smollm2.tokenizer.token(smollm2.tokenizer.eos_id) == "<|im_end|>"


def test_logits(golden, smollm2, logits_of):
    for case in golden["logits"]:
        ids = smollm2.tokenizer.encode(case["text"])
        logits = logits_of(ids)
        log_probs = np.asarray(jax.nn.log_softmax(logits, -1))[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(log_probs, case["token_logprobs"], rtol=0, atol=1e-3)
        last = logits[-1]
        assert np.argsort(-last)[:8].tolist() == case["last_top8_ids"]
        top = last[case["last_top8_ids"]]
        np.testing.assert_allclose(top, case["last_top8_logits"], rtol=0, atol=1e-3)
        total = float(jax.nn.logsumexp(last))
        assert total == pytest.approx(case["last_logsumexp"], abs=1e-3)


def test_greedy_answer(golden, smollm2, logits_of):
    ids = smollm2.tokenizer.encode(golden["greedy"]["prompt"])
    new: list[int] = []
    while smollm2.tokenizer.eos_id not in new and len(ids + new) < LENGTH:
        new.append(int(logits_of(ids + new)[-1].argmax()))
    assert new == golden["greedy"]["new_ids"]
    assert "Paris" in smollm2.tokenizer.decode(new)
    assert smollm2.tokenizer.decode(new, skip_special_tokens=False) == golden["greedy"]["text"]


def test_export_is_bit_equal(smollm2, tmp_path):
    folder = models.export(smollm2, tmp_path / "model")
    back = models.load(folder)
    assert back.config == smollm2.config
    same = jax.tree.map(lambda a, b: bool((a == b).all()), smollm2.params, back.params)
    assert all(jax.tree.leaves(same))
    messages = [{"role": "user", "content": "Who are you?"}]
    text = smollm2.tokenizer.chat(messages, add_generation_prompt=True)
    assert back.tokenizer.chat(messages, add_generation_prompt=True) == text
    assert back.tokenizer.encode(text) == smollm2.tokenizer.encode(text)
