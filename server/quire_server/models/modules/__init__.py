"""What runs: linear layers, norms, embeddings, halves and layers, each built from its part of a plan. The torch side.

A kind of attention or feed-forward that `kinds/` plans is built and run by its module here, and named in `builder.py`.
"""
