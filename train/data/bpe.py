"""A tokenizer trained in the run."""

from __future__ import annotations

from collections.abc import Iterable

from models import Tokenizer

LONGEST_WORD = 256  # bytes; the time of training grows with the square of a word's length


def train_bpe(texts: Iterable[str], vocab_size: int, split_digits: bool = False) -> Tokenizer:
    """A byte-level BPE tokenizer trained on texts; `<pad>` and `<eos>` are its special tokens.

    Training cuts words of more than 256 bytes, as texts without spaces have them; encoding does
    not.

    Args:
        texts: the texts, which are read once.
        vocab_size: the largest number of tokens, of which 256 are bytes and two are special.
        split_digits: whether every digit is a token of its own, without the space before it.

    Example:
        >>> tokenizer = train_bpe(["a cat", "a cat sat"], 262)
        >>> len(tokenizer.encode("a cat")), tokenizer.decode(tokenizer.encode("a dog"))
        (2, 'a dog')
        >>> apart = train_bpe(["12 + 12"] * 3, 300, split_digits=True)
        >>> [apart.decode([token]) for token in apart.encode("+ 12")]
        ['+', ' ', '1', '2']
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds

    backend = Backend(kinds.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    apart = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    before = pre_tokenizers.Sequence([*apart, words]) if apart else words
    pieces = pre_tokenizers.Sequence([before, pre_tokenizers.FixedLength(LONGEST_WORD)])
    backend.pre_tokenizer = pieces  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.pre_tokenizer = before  # type: ignore[assignment]
    return Tokenizer(
        backend, eos_id=backend.token_to_id("<eos>"), pad_id=backend.token_to_id("<pad>")
    )
