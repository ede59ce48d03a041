"""A text-to-image denoiser: a text encoder, and the denoiser that reads its states.

Both are trained, sharded and exchanged as one tree, `{"text_encoder": .., "unet": ..}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn.concepts import attack_token, init_network, project
from jaxlib_unlearn.objectives.denoising import PROMPT
from models import layout
from models.diffusion import clip_text, unet
from models.diffusion.clip_text import ClipText
from models.diffusion.unet import UNet
from models.learner import Batch, PlainLearner

NOISE = "noise"  # the question that a denoiser answers
TEXT, UNET = "text_encoder", "unet"
NETWORK = "network"  # of an attack: what is trained

RULES: layout.Rules = (*clip_text.RULES, *unet.RULES)


@dataclass(frozen=True)
class Diffusion:
    r"""Text encoder and denoiser as pure functions of `params`.

    .. math:: \hat\epsilon = \epsilon_\theta(z_t, t, \tau(c))

    Args:
        text: the encoder, tau.
        unet: the denoiser.

    Raises:
        ValueError: the denoiser reads states of another width.

    Example:
        >>> from models.diffusion.clip_text import ClipTextConfig
        >>> from models.diffusion.unet import UNetConfig
        >>> model = Diffusion(ClipText(ClipTextConfig()), UNet(UNetConfig()))
        >>> z, ids = jnp.zeros((2, 64, 64, 4)), jnp.zeros((2, 77), jnp.int32)
        >>> jax.eval_shape(model.noise, model.shapes(), z, jnp.array([1, 981]), ids).shape
        (2, 64, 64, 4)

    Paper: Rombach et al., arXiv:2112.10752, section 3.3.
    """

    text: ClipText
    unet: UNet

    def __post_init__(self):
        has, reads = self.text.config.hidden_size, self.unet.config.cross_attention_dim
        if has != reads:
            raise ValueError(
                f"the denoiser reads states of width {reads}, those of a text have {has}"
            )

    def shapes(self) -> dict[str, Any]:
        """The parameter tree as float32 `jax.ShapeDtypeStruct`s."""
        return {TEXT: self.text.shapes(), UNET: self.unet.shapes()}

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Random parameters of both."""
        one, two = jax.random.split(key)
        return {TEXT: self.text.init(one), UNET: self.unet.init(two)}

    def noise(
        self, params: Any, latents: jax.Array, time: jax.Array, tokens: jax.Array
    ) -> jax.Array:
        """The noise that latents hold, given token ids.

        Args:
            params: the tree of both.
            latents: noisy, `(B, H, W, C)`.
            time: `(B,)` or a scalar.
            tokens: int32 `(B, T)`.

        Returns:
            `(B, H, W, C)`.
        """
        return self.noise_given(params, latents, time, self.text.embed(params[TEXT], tokens))

    def noise_given(
        self, params: Any, latents: jax.Array, time: jax.Array, embeds: jax.Array
    ) -> jax.Array:
        """The same, given token embeddings `(B, T, d)`, which need not belong to words."""
        states = self.text.apply_embeds(params[TEXT], embeds)
        return self.unet.apply(params[UNET], latents, time, states)


@dataclass(frozen=True)
class AskedDenoiser:
    """A denoiser and its parameters, as objectives ask it.

    Args:
        model: the model.
        params: its parameters.
        embed: `(params, batch, token ids) -> embeddings`.
        together: batches whose noise, given their own prompts, one pass will predict.
        known: answers so far; they are added as they are asked for.
    """

    model: Diffusion
    params: Any
    embed: Any
    together: Sequence[Batch] = ()
    known: list[tuple[Batch, str, jax.Array]] = field(default_factory=list)

    def noise(self, batch: Batch, *prompts: str) -> tuple[jax.Array, ...]:
        """The noise in `batch["latents"]` at `batch["time"]`, for the prompt in each column.

        Those not yet known are computed in one pass.

        Returns:
            `(B, H, W, C)` each.
        """
        asked = [(batch, prompt) for prompt in dict.fromkeys(prompts)]
        if any(batch is other for other in self.together) and PROMPT in prompts:
            asked += [(other, PROMPT) for other in self.together if other is not batch]
        wanted = [(of, prompt) for of, prompt in asked if self._find(of, prompt) is None]
        if wanted:
            found = self.model.noise_given(
                self.params,
                _joined([of["latents"] for of, _ in wanted]),
                _joined([jnp.asarray(of["time"]) for of, _ in wanted]),
                _joined([self.embed(self.params, of, of[prompt]) for of, prompt in wanted]),
            )
            ends = np.cumsum([len(of["latents"]) for of, _ in wanted])
            for (of, prompt), part in zip(wanted, jnp.split(found, ends[:-1]), strict=True):
                self.known.append((of, prompt, part))
        answers = [self._find(batch, prompt) for prompt in prompts]
        return tuple(answer for answer in answers if answer is not None)

    def _find(self, batch: Batch, prompt: str) -> jax.Array | None:
        for other, name, found in self.known:
            if other is batch and name == prompt:
                return found
        return None


def _joined(parts: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class DiffusionLearner(PlainLearner):
    """A text-to-image denoiser as the trainer sees it, see `models.learner.Learner`.

    Args:
        model: the model.
    """

    model: Diffusion
    answers = frozenset((NOISE,))
    rules = RULES

    @property
    def sizes(self) -> Mapping[str, int]:
        """Width of the text's states, size of the vocabulary."""
        c = self.model.text.config
        return {"hidden": c.hidden_size, "vocab": c.vocab_size}

    @property
    def dtype(self) -> str:
        """The dtype of the denoiser's computation."""
        return self.model.unet.config.dtype

    def identity(self) -> Any:
        """Both configurations, as JSON values."""
        return {TEXT: asdict(self.model.text.config), UNET: asdict(self.model.unet.config)}

    def embed(self, params: Any, batch: Batch, tokens: jax.Array) -> jax.Array:
        """The embeddings of token ids, `(B, T, d)`."""
        del batch
        return self.model.text.embed(params[TEXT], tokens)

    def ask(self, params: Any, together: Sequence[Batch] = ()) -> Any:
        """The denoiser as objectives ask it."""
        return AskedDenoiser(self.model, params, self.embed, together)


def placed(embeds: jax.Array, batch: Batch, learned: jax.Array) -> jax.Array:
    """Embeddings `(B, T, d)` with a learned one `(d,)` at `batch["place"]` of each row."""
    here = jnp.arange(embeds.shape[1]) == jnp.asarray(batch["place"])[:, None]
    return jnp.where(here[..., None], learned.astype(embeds.dtype), embeds)


@dataclass(frozen=True)
class InversionLearner(DiffusionLearner):
    """A denoiser to which one embedding is learned freely: textual inversion, the attack of CCE.

    Its tree is the model's with two further parts: `network`, the embedding that is trained, and
    `shield`, the span that a defence removes from it, `{"embedding": (d, S)}`. A batch also has
    `place (B,)`, the position of the learned embedding.

    Args:
        model: the model, all of it frozen.
        shield: S, the number of columns of the span; 0: there is no defence.

    Paper: Gal et al., arXiv:2208.01618, section 4; Pham et al., arXiv:2308.01508, as an attack.
    """

    shield: int = 0
    rules = (*RULES, (r"^(network|shield)/", ()))

    def identity(self) -> Any:
        """Both configurations, and the size of the span, as JSON values."""
        return {**super().identity(), "shield": self.shield}

    def shapes(self) -> Any:
        """The parameter tree as float32 `jax.ShapeDtypeStruct`s."""
        width = self.model.text.config.hidden_size
        sizes = {NETWORK: (width,), "shield": (width, self.shield)}
        return self.model.shapes() | {
            name: {"embedding": jax.ShapeDtypeStruct(shape, jnp.float32)}
            for name, shape in sizes.items()
        }

    def embed(self, params: Any, batch: Batch, tokens: jax.Array) -> jax.Array:
        """The embeddings of token ids, with the learned one at its place."""
        embeds = self.model.text.embed(params[TEXT], tokens)
        learned = project(params[NETWORK]["embedding"], params["shield"]["embedding"])
        return placed(embeds, batch, learned)


@dataclass(frozen=True)
class AttackLearner(DiffusionLearner):
    """A denoiser to which one token is learned, as SubAttack does it.

    Its tree is the model's with two further parts: `network`, the one that is trained, and `basis`,
    the span of the earlier tokens, `{"embedding": (d, K)}`. A batch also has `place (B,)`, the
    position of the learned embedding.

    Args:
        model: the model, all of it frozen.
        words: the number of rows of the vocabulary that are combined; special tokens follow them.
        hidden: the number of hidden units of the network.
        form: the orthogonality constraint, a word of `jaxlib_unlearn.concepts.tokens.FORMS`.
        positive: the function that makes coefficients non-negative, a word of its `POSITIVE`.
        tokens: K, the largest number of tokens that a basis holds.
    """

    words: int = 0
    hidden: int = 100
    form: str = "deflate"
    positive: str = "softplus"
    tokens: int = 1
    rules = (*RULES, (r"^(network|basis)/", ()))

    def identity(self) -> Any:
        """Both configurations, and how a token is made, as JSON values."""
        names = ("words", "hidden", "form", "positive", "tokens")
        return {**super().identity(), **{name: getattr(self, name) for name in names}}

    def shapes(self) -> Any:
        """The parameter tree as float32 `jax.ShapeDtypeStruct`s."""

        def leaf(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        width = self.model.text.config.hidden_size
        made = jax.eval_shape(lambda: init_network(jax.random.key(0), width, self.hidden))
        network = jax.tree.map(lambda x: leaf(*x.shape), made)
        return self.model.shapes() | {
            NETWORK: network,
            "basis": {"embedding": leaf(width, self.tokens)},
        }

    def token(self, params: Any) -> Any:
        """The token that the network makes now, a `jaxlib_unlearn.concepts.Token`."""
        return attack_token(
            params[NETWORK],
            params[TEXT]["embed"]["embedding"][: self.words],
            params["basis"]["embedding"],
            form=self.form,
            positive=self.positive,
        )

    def embed(self, params: Any, batch: Batch, tokens: jax.Array) -> jax.Array:
        """The embeddings of token ids, with the learned one at its place."""
        embeds = self.model.text.embed(params[TEXT], tokens)
        return placed(embeds, batch, self.token(params).embedding)
