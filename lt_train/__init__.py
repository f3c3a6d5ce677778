"""Turn a full-attention reasoning model into a hybrid one: find lazy layers, stream them, fine-tune, measure, export."""

__version__ = "0.1.0"
