"""Bytes and floating point operations of one dense Llama, as formulas; the parts of ``benchmarks/capacity.py``.

Left out: mixtures of experts, biases, and head dimensions other than ``hidden / heads``.
"""

from __future__ import annotations

from typing import NamedTuple

#: Bytes of a trained parameter: weight, gradient, optimiser (two moments and a master copy), copy for the forward
#: pass. "autocast" is what the agents do on CUDA: float32 weights with a bfloat16 copy to decode with; "mixed" has
#: bfloat16 weights and a float32 master copy (Rajbhandari et al. 2020, ZeRO, section 3.1).
PRECISIONS = {
    "float32": (4, 4, 8, 0),
    "autocast": (4 + 2, 4, 8, 2),
    "mixed": (2, 2, 12, 0),
}
#: What an 8-bit optimiser keeps instead of two moments: two bytes, and two float32 scales for 256 parameters.
EIGHT_BIT_MOMENTS = 2 + 2 * 4 / 256
#: Bytes of a weight in four bits: NF4 with a scale for 64 weights, itself in eight bits (Dettmers et al. 2023,
#: arXiv:2305.14314, section 3).
FOUR_BIT_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)
#: Tensors ``[tokens, V]`` of float32 that live at once when the log-probabilities go backward.
LOGIT_COPIES = 4
#: How often a float32 logit is read or written beside the matrix products: for a log-probability and an entropy, when
#: these go backward, and when a token is sampled. Counted in ``textrl_env/lm/teacher_forcing.py`` and ``decoding.py``.
LOGIT_TOUCHES = {"forward": 11, "backward": 18, "sample": 12}


class Shape(NamedTuple):
    """A Llama: ``V``, width, width of the MLP, layers, query heads, key heads, tied embeddings."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool = False

    @property
    def kv_width(self) -> int:
        """Elements of the keys (or of the values) of one token in one layer."""
        return self.hidden // self.heads * self.kv_heads


def shape_of(config: object) -> Shape:
    """The shape of a transformers Llama config."""
    return Shape(
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.tie_word_embeddings,
    )


def shape_for(params: float, vocab: int = 128_256) -> Shape:
    """A Llama of so many parameters: ``hidden = 128 layers``, four queries to a key, the MLP takes what is left.

    Embeddings are tied below four billion, as published models mostly have it.

    Raises:
        ValueError: The embeddings alone have more parameters.
    """
    shapes = []
    for layers in range(4, 257, 4):
        bare = Shape(vocab, 128 * layers, 0, layers, layers, layers // 4, params < 4e9)
        intermediate = round((params - parameter_count(bare)) / (3 * bare.hidden * layers))
        if intermediate > 0:
            shapes.append(bare._replace(intermediate=intermediate))
    if not shapes:
        raise ValueError(
            f"{params:.3g} parameters are fewer than the embeddings of {vocab} tokens take; lower the vocabulary"
        )
    return min(shapes, key=lambda shape: abs(shape.intermediate / shape.hidden - 3.5))


def layer_matrices(shape: Shape) -> int:
    """Weights of the seven matrices of a layer: queries, keys, values, output, and three of the MLP."""
    return 2 * shape.hidden * (shape.hidden + shape.kv_width) + 3 * shape.hidden * shape.intermediate


def parameter_count(shape: Shape) -> int:
    """Parameters of the language model, its norms and embeddings included."""
    embeddings = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    return shape.layers * (layer_matrices(shape) + 2 * shape.hidden) + embeddings + shape.hidden


def lora_parameter_count(shape: Shape, rank: int) -> int:
    """Parameters of LoRA on the seven matrices of every layer: ``rank (inputs + outputs)`` each."""
    attention = 4 * shape.hidden + 2 * (shape.hidden + shape.kv_width)
    return shape.layers * rank * (attention + 3 * (shape.hidden + shape.intermediate))


def kv_bytes(shape: Shape, tokens: float, element: int = 2) -> float:
    """Bytes of the keys and values of so many tokens in all layers."""
    return 2 * shape.layers * shape.kv_width * tokens * element


def state_bytes(
    total: float, trainable: float, precision: str = "mixed", eight_bit: bool = False, four_bit: float = 0
) -> dict[str, float]:
    """Bytes of a model that learns: weights, gradients, optimiser, and while it is updated two more.

    "cast" are copies of the weights in the precision of the products; "waiting" are gradients of weights that are
    used twice in one graph, which wait for each other.

    Args:
        total: Parameters.
        trainable: Those that learn; the others lie frozen, in bfloat16 unless the precision is "float32".
        precision: One of ``PRECISIONS``.
        eight_bit: Two bytes instead of Adam's two moments.
        four_bit: How many of those that lie frozen are in four bits.
    """
    weight, gradient, optimizer, cast = PRECISIONS[precision]
    optimizer += EIGHT_BIT_MOMENTS - 8 if eight_bit else 0
    frozen = (total - trainable - four_bit) * frozen_bytes(precision) + four_bit * FOUR_BIT_WEIGHT
    return {
        "weights": frozen + trainable * weight,
        "gradients": trainable * gradient,
        "optimizer": trainable * optimizer,
        "cast": trainable * cast,
        "waiting": trainable * (cast or gradient),
    }


def frozen_bytes(precision: str) -> int:
    """Bytes of a parameter that does not learn, and of an element of the cache."""
    return 4 if precision == "float32" else 2


def activation_bytes(
    shape: Shape, tokens: float, keys: float, precision: str = "mixed", checkpointing: bool = False
) -> float:
    """Bytes that autograd keeps of the layers.

    What transformers' Llama saves with scaled-dot-product attention: the inside and outside of two norms, the
    inputs of the seven matrices, the queries, four tensors of the MLP's width; ``keys`` is counted apart because
    rows that continue a shared prompt hold a copy of it. With checkpointing, the input of every layer and one
    layer in full.

    Args:
        shape: The model.
        tokens: Padded tokens of a micro-batch.
        keys: Elements of keys, values and attention masks that one layer holds; see :func:`key_elements`.
        precision: One of ``PRECISIONS``.
        checkpointing: Whether layers are computed again when going backward.
    """
    h, inner = shape.hidden, 4 * shape.intermediate
    small = 4 * (2 + shape.heads)  # inverse norms and log-sum-exps, always float32
    per_token = {
        "float32": 4 * (8 * h + inner) + small,
        "autocast": 4 * 4 * h + 2 * (7 * h + inner) + small,
        "mixed": 4 * 2 * h + 2 * (6 * h + inner) + small,
    }[precision]
    layer = tokens * per_token + keys * frozen_bytes(precision)
    if not checkpointing:
        return shape.layers * layer
    stream = tokens * h * (4 if precision in ("float32", "autocast") else 2)
    return shape.layers * stream + layer


def key_elements(shape: Shape, rows: float, prompt: float, response: float, shared: bool) -> float:
    """Elements of keys, values and masks that one layer keeps for ``rows`` sequences.

    With a shared prompt every row holds it beside its own keys, repeated for every query head, and a mask.
    """
    if shared:
        return rows * (prompt + response) * (2 * shape.hidden + response)
    return rows * (prompt + response) * 2 * shape.kv_width


def logit_bytes(shape: Shape, tokens: float, at_once: float | None = None) -> float:
    """Bytes of logits and what is computed from them: of all tokens, or of ``at_once // V`` tokens at a time."""
    return LOGIT_COPIES * 4 * min(shape.vocab * tokens, max(at_once or float("inf"), shape.vocab))


def logit_traffic(shape: Shape, tokens: float, *kinds: str) -> float:
    """Bytes read and written to make log-probabilities of logits; what a vocabulary costs beside its products."""
    return 4 * shape.vocab * tokens * sum(LOGIT_TOUCHES[kind] for kind in kinds)


def forward_flops(shape: Shape, tokens: float, context: float, logits: float = 0) -> float:
    """Floating point operations of a forward pass.

    Args:
        shape: The model.
        tokens: Tokens that pass.
        context: Keys that each of them meets, masked ones included.
        logits: How many of them get logits.
    """
    attention = 4 * context * shape.hidden
    head = 2 * logits * shape.vocab * shape.hidden
    return tokens * shape.layers * (2 * layer_matrices(shape) + attention) + head


def read_bytes(shape: Shape, rows: float, context: float, weight: int = 2, element: int = 2) -> float:
    """Bytes that decoding one token for each of ``rows`` has to read: all matrices once, every row's own cache."""
    matrices = shape.layers * layer_matrices(shape) + shape.vocab * shape.hidden
    return weight * matrices + kv_bytes(shape, rows * context, element)
