"""A tokenizer trained in the run."""

from __future__ import annotations

from collections.abc import Iterable

from models import Tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer trained on texts; `<pad>` and `<eos>` are its special tokens.

    Args:
        texts: read once.
        vocab_size: at most that many tokens, of which 256 are bytes and two are special.

    Example:
        >>> tokenizer = train_bpe(["a cat", "a cat sat"], 262)
        >>> len(tokenizer.encode("a cat")), tokenizer.decode(tokenizer.encode("a dog"))
        (2, 'a dog')
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds

    backend = Backend(kinds.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(
        backend, eos_id=backend.token_to_id("<eos>"), pad_id=backend.token_to_id("<pad>")
    )
