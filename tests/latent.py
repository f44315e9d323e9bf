"""A family with latent attention, for tests: what is kept of a token is one narrow vector.

Keys and values are made of it anew for every query (arXiv:2405.04434, section 2.1, without the part
that carries positions). Otherwise it is Llama.
"""

import sys

import jax
import jax.numpy as jnp

from jaxlm import config as cfg
from jaxlm.models import llama
from jaxlm.models.layers import normal

NAME = "latent"
LATENT = "cache_batch cache_seq _"
Norm, encode_positions, check = llama.Norm, llama.encode_positions, llama.check
MODEL_TYPES, PREFIX, IGNORED, NAMES = (NAME,), llama.PREFIX, llama.IGNORED, llama.NAMES
from_hugging_face, to_hugging_face = llama.from_hugging_face, llama.to_hugging_face


@cfg.section
class Config(llama.Config):
    """Llama's keys, and the width of what is kept."""

    latent_dim: int = cfg.key(6, "width of what is kept of a token", minimum=1)


class Block(llama.Block):
    """Attention alone; keys and values are products of the latent vector."""

    @staticmethod
    def cache(config):
        return ((LATENT, (config.latent_dim,)),)

    def __init__(self, config, layout, key):
        super().__init__(config, layout, key)
        keys, R = jax.random.split(key, 3), config.latent_dim
        H, C, D = config.num_heads, config.head_dim, config.embed_dim
        self.narrow = layout.param(normal(keys[0], 0.2), (D, R), "embed _")
        self.keys = layout.param(normal(keys[1], 0.2), (R, H, C), "_ heads head_dim")
        self.values = layout.param(normal(keys[2], 0.2), (R, H, C), "_ heads head_dim")

    def __call__(self, x_BSD, table, segments_BS, layout, cache=None):
        s, w = layout, layout.gather
        h_BSD = s.move(self.attention_norm(x_BSD, s), "batch seq _", over="heads")
        q_BSHC = s.dot("bsd,dhc->bshc", h_BSD, w(self.attention.q))
        c_BTR = s.dot("bsd,dr->bsr", h_BSD, w(self.narrow))
        length = x_BSD.shape[1]
        last_BS = jnp.broadcast_to(jnp.arange(length), x_BSD.shape[:2])
        if cache is not None:
            kept_BTR, last_BS = cache
            slots_T, new_BTR = jnp.arange(kept_BTR.shape[1]), s.move(c_BTR, LATENT)
            if length > 1:
                rest = kept_BTR.shape[1] - length
                cache = (jnp.pad(new_BTR, [(0, 0), (0, rest), (0, 0)]),)
            else:
                here_BT = slots_T == s.move(last_BS, "cache_batch _")
                cache = (jnp.where(here_BT[:, :, None], new_BTR, kept_BTR),)
                c_BTR = s.move(cache[0], "batch _ _")
        k_BTHC = s.dot("btr,rhc->bthc", c_BTR, w(self.keys))
        v_BTHC = s.dot("btr,rhc->bthc", c_BTR, w(self.values))
        scores_BHST = jnp.einsum("bshc,bthc->bhst", q_BSHC, k_BTHC)
        seen_BST = jnp.arange(c_BTR.shape[1]) <= last_BS[:, :, None]
        scores_BHST = jnp.where(seen_BST[:, None], scores_BHST, -jnp.inf)
        a_BSHC = jnp.einsum("bhst,bthc->bshc", jax.nn.softmax(scores_BHST), v_BTHC)
        y_BSD = s.dot("bshc,hcd->bsd", a_BSHC, w(self.attention.o), out="batch residual_seq _")
        return x_BSD + y_BSD, cache, {}


def groups(config):
    return [((Block,), config.num_layers)]


def register(monkeypatch) -> None:
    """Make it a family, as a file in jaxlm/models would be."""
    monkeypatch.setitem(sys.modules, f"jaxlm.models.{NAME}", sys.modules[__name__])
