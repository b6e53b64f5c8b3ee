"""The server's command line as data: which flags `quire serve` has, what they may hold, and which of vLLM's it refuses.

The server builds its parser from this room; the operator judges `spec.engine.extraArgs` by it before a pod is replaced.
"""
