"""What a model takes of a device's memory: the one arithmetic of server, download Job and operator. Plain integers.

`model_shape` is what crosses between them, `kv_cache` what the KV cache keeps and how a block lies, `fit` the sums.
"""
