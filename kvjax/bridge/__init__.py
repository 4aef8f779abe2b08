"""Doors to Flax: the decoder and cached attention as Linen and as NNX modules.

`import kvjax` does not import this; ask for `kvjax.bridge.linen` or `kvjax.bridge.nnx` by name.
"""
