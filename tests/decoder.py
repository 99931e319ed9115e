"""Tiny configurations of causal models, inputs for them, and their weights as the owners would publish them."""

import re

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

LAYERS, WIDTH, INNER, VOCABULARY, POSITIONS = 3, 24, 40, 50, 32
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_VARIANTS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 8},
    "llama3": {"rope_parameters": LLAMA3},
    "linear": {"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 4.0}, "num_key_value_heads": 4},
    "qwen2": {"model_type": "qwen2", "rms_norm_eps": 1e-5},
}
LLAMAS = tuple(_VARIANTS)


def config(kind: str = "llama") -> dict:
    """One of `LLAMAS` or `gpt2`. Weights are large, so that a wrong one shows."""
    if kind == "gpt2":
        sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_inner": INNER, "n_positions": POSITIONS}
        return {"model_type": "gpt2", "vocab_size": VOCABULARY, "initializer_range": 0.3} | sizes
    return {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": INNER,
        "max_position_embeddings": POSITIONS,
        "hidden_act": "silu",
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "rope_theta": 100.0,
    } | _VARIANTS[kind]


def inputs(lengths=(10, 7, 2), left: bool = False, seed: int = 0, width: int = 10) -> dict:
    """`tokens`, `mask` [3, 10]; real tokens at the right end if `left` is padded. They are the same on either side."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((len(lengths), width), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if left else slice(0, length)
        tokens[row, place] = rng.integers(3, VOCABULARY, width)[:length]
        mask[row, place] = True
    return {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask)}


def forked(answers=(2, 1, 3), prompt: int = 4, width: int = 12) -> tuple[dict, list[tuple[np.ndarray, np.ndarray]]]:
    """One text whose prompt has several answers, and its branches: tokens [n] of each alone, and their places in it."""
    rng = np.random.default_rng(3)
    branch = np.repeat(np.arange(len(answers) + 1), [prompt, *answers])
    tokens, mask = rng.integers(3, VOCABULARY, width).astype(np.int32), np.arange(width) < len(branch)
    branch = np.pad(branch, (0, width - len(branch)))
    places = [np.flatnonzero(mask & ((branch == 0) | (branch == own))) for own in range(1, len(answers) + 1)]
    whole = {"tokens": tokens[None], "mask": mask[None], "branch": branch[None].astype(np.int32)}
    return whole, [(tokens[own], own) for own in places]


def check_forks(apply) -> None:
    """Each branch of a text has the outputs that it has alone; `apply` is a model's, of inputs."""
    whole, branches = forked()
    found = apply(whole)[0]
    for tokens, places in branches:
        alone = apply({"tokens": tokens[None], "mask": np.ones((1, len(tokens)), bool)})[0]
        np.testing.assert_allclose(found[places], alone, atol=1e-4)
    # Without the fork later answers would see the ones before.
    joined = apply({name: whole[name] for name in ("tokens", "mask")})[0]
    assert np.abs(joined - found)[branches[1][1][-1]].max() > 0.1


def published(base: dict) -> dict[str, np.ndarray]:
    """Our parameters under their Hugging Face names and layouts: the inverse of the tables, written independently."""
    tensors = {}
    for path, leaf in traverse_util.flatten_dict(base, sep=".").items():
        leaf = np.asarray(leaf)
        name = re.sub(r"\.(kernel|embedding|scale)$", ".weight", path)
        stack = re.search(r"\.(layers|h)\.", name)
        flip = path.endswith("kernel") and ".h." not in path
        for layer, value in enumerate(leaf) if stack else [(None, leaf)]:
            short = name.replace(stack[0], f"{stack[0]}{layer}.") if stack else name
            tensors[short] = np.ascontiguousarray(value.T if flip else value)
    return tensors
