"""How many positions a model can place: beyond them a learned or tabulated position has no row."""

from __future__ import annotations

from typing import Any, NamedTuple

# Position ids of these begin behind the padding id, in a table that counts the rows before it, too.
FROM_PADDING = frozenset(
    {
        *(
            "roberta",
            "xlm-roberta",
            "xlm-roberta-xl",
            "camembert",
            "roberta-prelayernorm",
            "data2vec-text",
            "xmod",
        ),
    }
)


class PositionLimits(NamedTuple):
    """Most tokens that a model can place; None where it sets no bound (relative positions, as T5's).

    ``prompt`` bounds what the encoder reads, None for decoder-only models; ``text`` what the decoder holds: of a
    decoder-only model the prompt and what follows it.
    """

    prompt: int | None
    text: int | None


def room_of(models: tuple[Any, ...]) -> PositionLimits:
    """The least room of several models, which read the same prompts."""
    rooms = [_room(model.config) for model in models]
    return PositionLimits(
        *(min((size for size in sizes if size is not None), default=None) for sizes in zip(*rooms))
    )


def _room(config: Any) -> PositionLimits:
    text = config.get_text_config(decoder=True)
    decoder = _size(
        text, "max_decoder_position_embeddings", "max_target_positions", "max_position_embeddings"
    )
    if not config.is_encoder_decoder:
        return PositionLimits(None, decoder)
    encoder = getattr(config, "encoder", None)
    source = encoder if hasattr(encoder, "max_position_embeddings") else config.get_text_config(encoder=True)
    return PositionLimits(
        _size(source, "max_encoder_position_embeddings", "max_position_embeddings"), decoder
    )


def _size(config: Any, *names: str) -> int | None:
    size = next((size for name in names if isinstance(size := getattr(config, name, None), int)), None)
    if size is None or size < 1:
        return None
    begins = (config.pad_token_id or 0) + 1 if config.model_type in FROM_PADDING else 0
    return max(1, size - begins)
