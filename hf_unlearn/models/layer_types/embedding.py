"""`torch.nn.Embedding`: a linear map of one-hot rows, whose Gram is the count of each token."""

from torch import nn

from hf_unlearn.models.layers import Layer, register_layer


@register_layer(nn.Embedding)
def embedding(module: nn.Embedding) -> Layer | None:
    """Describe an embedding; None if it rescales its weight, has sparse gradients, or computes something else.

    With a constraint the vectors of tokens that occur in the retain set stay as they are.
    """
    if type(module).forward is not nn.Embedding.forward or module.max_norm is not None or module.sparse:
        return None
    return Layer(
        outputs=module.embedding_dim,
        inputs=module.num_embeddings,
        transposed=True,
        rows=lambda indices: indices.unsqueeze(-1),
        diagonal=True,
        by_default=False,
    )
