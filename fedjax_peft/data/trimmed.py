"""The tokenizer of a model whose vocabulary was trimmed."""

import numpy as np

from fedjax_peft.data.federated import Encoded
from fedjax_peft.data.tokenizers import Tokenizer


def tokenizer(whole: Tokenizer, kept: np.ndarray) -> Tokenizer:
    """A tokenizer whose ids are positions in `kept`.

    Other tokens become the unknown one; without one they are left out of texts.

    Args:
      whole: the tokenizer of the model before.
      kept: [V] ids in ascending order, as from `federated.vocabulary`.
    """
    position = {int(token): i for i, token in enumerate(kept)}
    unk = position.get(whole.unk)

    def encode(*texts, **settings) -> Encoded:
        encoded = whole.encode(*texts, **settings)
        at = np.minimum(np.searchsorted(kept, encoded.tokens), len(kept) - 1)
        known = kept[at] == encoded.tokens
        stays = known | (unk is not None)
        return encoded._replace(
            tokens=np.where(known, at, unk or 0)[stays].astype(np.int32),
            types=None if encoded.types is None else encoded.types[stays],
            offsets=np.append(0, np.cumsum(stays, dtype=np.int64))[encoded.offsets],
            spans=None if encoded.spans is None else encoded.spans[stays],
        )

    return whole._replace(
        encode=encode,
        decode=lambda ids: whole.decode(kept[np.asarray(ids, np.int64)]),
        **{name: position.get(getattr(whole, name)) for name in ("pad", "eos", "bos")},
        unk=unk,
        special=tuple(position[token] for token in whole.special if token in position),
        size=len(kept),
    )
